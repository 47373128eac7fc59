"""Arrays that several processes write into a folder together: zarr3, in chunks with a checksum each.

Every process writes what lies on its devices. No chunk is cut between two devices, so each is written once, and its
checksum is of the bytes that were written. They are in `sums.<process>.json` beside the arrays.
"""

import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from headshare_jax.convert import storage
from headshare_jax.convert.native_array import UNREADABLE
from headshare_jax.convert.native_document import checksum
from headshare_jax.errors import HeadshareError

# A chunk is at most so large, if that cuts no row of an array's leading axis.
CHUNK_BYTES = 64 * 2**20
# Chunks that are being written at a time, or read.
_AT_A_TIME = 4

Place = tuple[slice, ...]
# Where in an array something begins, and what gives its values.
Piece = tuple[tuple[int, ...], Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Part:
    """What a process writes of an array.

    Attributes:
      shape, dtype: of all of it.
      held: shape of what a device holds.
      pieces: what this process's devices hold, each of shape `held`; pieces that several devices hold are written by
        one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    held: tuple[int, ...]
    pieces: Sequence[Piece]


def write(folder: Path, parts: Mapping[str, Part], process: int) -> None:
    """Writes a process's parts of arrays into a folder, and their checksums last.

    Raises:
      OSError, ValueError: the folder cannot be written to.
    """
    sums: dict[str, dict[str, str]] = {}
    writes: deque[ts.WriteFutures] = deque()
    storage.make_folder(folder)
    try:
        for name, part in parts.items():
            chunk = _chunk_shape(part)
            array = ts.open(_spec(folder / name, part, chunk), create=True, open=True).result()
            for start, give in part.pieces:
                values = give()
                for place in _chunks(part.held, chunk):
                    first = tuple(at + cut.start for at, cut in zip(start, place, strict=True))
                    inside = np.asarray(values[place], order="C")
                    key = _key(at // size for at, size in zip(first, chunk, strict=True))
                    sums.setdefault(name, {})[key] = checksum(inside.reshape(-1))
                    target = tuple(slice(at, at + size) for at, size in zip(first, inside.shape, strict=True))
                    writes.append(array[target].write(inside, can_reference_source_data_indefinitely=True))
                    if len(writes) > _AT_A_TIME:
                        writes.popleft().result()
        while writes:
            writes.popleft().result()
    finally:
        # So that after an error none goes on behind the back of whoever cleans up.
        for write in writes:
            write.exception()
    sums_file(folder, process).write_text(json.dumps(sums), encoding="utf-8")


def sums_file(folder: Path, process: int) -> Path:
    """Where a process keeps the checksums of its chunks."""
    return folder / f"sums.{process}.json"


def seals(folder: Path, processes: int) -> list[str]:
    """Checksums of every process's file of checksums, by which the whole folder is known."""
    return [checksum(sums_file(folder, process).read_bytes()) for process in range(processes)]


def _chunk_shape(part: Part) -> tuple[int, ...]:
    if not part.held:
        return ()
    rows, row_bytes = part.held[0], math.prod(part.held[1:]) * part.dtype.itemsize
    most = max(1, min(rows, CHUNK_BYTES // max(1, row_bytes)))
    if part.held[0] == part.shape[0]:
        # Of as many chunks as it takes, the last may be smaller.
        return (-(-rows // -(-rows // most)), *part.held[1:])
    return (next(size for size in range(most, 0, -1) if rows % size == 0), *part.held[1:])


def _spec(path: Path, part: Part, chunk: tuple[int, ...]) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": storage.kvstore(path),
        "metadata": {
            "shape": part.shape,
            "data_type": part.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        # A chunk of zeros must be there, so that a lost one can be told.
        "store_data_equal_to_fill_value": True,
    }


def _chunks(shape: Sequence[int], chunk: Sequence[int]) -> Iterable[Place]:
    """Where the chunks of an array of some shape lie."""
    cuts = [
        [slice(start, min(start + size, length)) for start in range(0, length, size)]
        for length, size in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*cuts)


def _key(grid: Iterable[int]) -> str:
    return ".".join(map(str, grid))


class StoredTree:
    """Arrays in a folder that `write` filled; every chunk is verified as it is read.

    Raises:
      HeadshareError: a file of checksums is missing, or is not the one that was written.
    """

    def __init__(self, folder: Path, sealed: Sequence[str], *, cache_bytes: int = 0):
        """Takes the checksums of the files of checksums; chunks of so many bytes are kept for those who come again."""
        self.folder = folder
        self._sums: dict[str, dict[str, str]] = {}
        for process, seal in enumerate(sealed):
            file = sums_file(folder, process)
            try:
                with storage.reached(file):
                    content = file.read_bytes()
            except OSError as error:
                raise HeadshareError(f"{file} cannot be read") from error
            if checksum(content) != seal:
                raise HeadshareError(f"{file} is damaged")
            for name, sums in json.loads(content).items():
                self._sums.setdefault(name, {}).update(sums)
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
        self._arrays: dict[str, Any] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array."""
        return tuple(self._array(name).shape)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of an array."""
        return np.dtype(self._array(name).dtype.numpy_dtype)

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            # A lost chunk must be an error, never zeros.
            spec = {"driver": "zarr3", "kvstore": storage.kvstore(self.folder / name), "fill_missing_data_reads": False}
            try:
                self._arrays[name] = ts.open(spec, open=True, context=self._context).result()
            except UNREADABLE as error:
                raise self._refusal(name, error) from error
        return self._arrays[name]

    def read(self, name: str, places: Sequence[Place]) -> list[np.ndarray]:
        """An array's values in some places; no chunk is read twice for them.

        Raises:
          HeadshareError: they cannot be read, or a chunk does not have its checksum.
        """
        array = self._array(name)
        places = [_within(array.shape, place) for place in places]
        values = [np.empty([cut.stop - cut.start for cut in place], self.dtype(name)) for place in places]
        chunk = array.chunk_layout.read_chunk.shape or ()
        reads: deque[tuple[Place, Any]] = deque()
        for at in _chunks(array.shape, chunk):
            if any(_common(at, place) is not None for place in places):
                reads.append((at, array[at].read()))
            if len(reads) > _AT_A_TIME:
                self._take(name, chunk, *reads.popleft(), places, values)
        while reads:
            self._take(name, chunk, *reads.popleft(), places, values)
        return values

    def _take(
        self, name: str, chunk: Sequence[int], at: Place, read: Any, places: Sequence[Place], values: list[np.ndarray]
    ) -> None:
        """Verifies a chunk, and gives each place what it has of it."""
        try:
            found = np.asarray(read.result(), order="C")
        except UNREADABLE as error:
            raise self._refusal(name, error) from error
        key = _key(cut.start // size for cut, size in zip(at, chunk, strict=True))
        if checksum(found.reshape(-1)) != self._sums.get(name, {}).get(key):
            raise HeadshareError(f"chunk {key or 0} of {name} in {self.folder} is not what was saved")
        for place, value in zip(places, values, strict=True):
            common = _common(at, place)
            if common is not None:
                value[_from(place, common)] = found[_from(at, common)]

    def _refusal(self, name: str, error: Exception) -> HeadshareError:
        return storage.refusal_at(error, self.folder) or HeadshareError(
            f"{name} in {self.folder} is incomplete or corrupt"
        )


def _within(shape: Sequence[int], place: Place) -> Place:
    """A place with the bounds of every axis spelled out."""
    place = (*place, *[slice(None)] * (len(shape) - len(place)))
    return tuple(slice(*cut.indices(size)[:2]) for cut, size in zip(place, shape, strict=True))


def _common(one: Place, other: Place) -> Place | None:
    """Where two places meet."""
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return both if all(cut.start < cut.stop for cut in both) else None


def _from(base: Place, place: Place) -> Place:
    """A place within another, counted from where that begins."""
    return tuple(slice(cut.start - a.start, cut.stop - a.start) for a, cut in zip(base, place, strict=True))
