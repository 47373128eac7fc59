"""One array of a native checkpoint: written shard by shard, read with every chunk's checksum verified."""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from headshare_jax.ahead import in_order
from headshare_jax.convert import storage
from headshare_jax.convert.native_document import checksum, named
from headshare_jax.convert.written import Written
from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.source import table_rows

# A file holds as many chunks as fit into so many bytes, or one.
SHARD_BYTES = 64 * 2**20
# What TensorStore raises, by the kind of damage.
UNREADABLE = (ValueError, OSError, RuntimeError, IndexError, KeyError, NotImplementedError, OverflowError)


@dataclass(frozen=True)
class Deferred:
    """An array that is read, part after part, only when its turn to be written comes.

    Attributes:
      shape, dtype: of all of it.
      layered: there is a chunk for each row of its leading axis.
      parts: rows of that axis, in order, and what gives their values.
      threads: that read parts ahead; 0 reads them as they are written.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    layered: bool
    parts: Iterable[tuple[slice, Callable[[], np.ndarray]]]
    threads: int = 0


def write(path: Path, value: Deferred, notes: Written | None = None) -> list[str]:
    """Writes a sharded zarr array, uncompressed: weights do not compress, and a layer or a head can be read by itself.

    Files that a killed process has noted as written, and that have the checksums it noted, are kept.

    Returns:
      The checksum of every chunk.

    Raises:
      OSError, ValueError: the folder cannot be written to.
    """
    chunk, shard = layout(value)
    array = ts.open(_spec(path, value, chunk, shard), open=True, create=True).result()
    notes = notes or Written()
    kept = {}
    for start in range(0, value.shape[0], shard):
        sums = notes.sums(f"{path.name}/{start}")
        if sums and sums == _sums_there(array, slice(start, start + shard), chunk):
            kept[start] = sums
    found = dict(kept)
    writes: deque[tuple[int, ts.WriteFutures]] = deque()

    def end_first() -> None:
        start, write = writes[0]
        write.result()
        notes.add(f"{path.name}/{start}", found[start])
        writes.popleft()

    try:
        for start, values in _shards(value, shard, kept):
            found[start] = _checksums(values, chunk)
            rows = array[start : start + len(values)]
            writes.append((start, rows.write(values, can_reference_source_data_indefinitely=True)))
            if len(writes) > 1:
                end_first()
        while writes:
            end_first()
    finally:
        # So that after an error none goes on behind the back of whoever cleans up.
        for _, write in writes:
            write.exception()
    return [digest for start in sorted(found) for digest in found[start]]


def _sums_there(array: ts.TensorStore, rows: slice, chunk: int) -> list[str]:
    """Checksums of a file's chunks as they are stored; none if it cannot be read."""
    try:
        stop = min(rows.stop, array.shape[0])
        return _checksums(np.asarray(array[rows.start : stop].read().result()), chunk)
    except UNREADABLE:
        return []


def layout(value: Deferred) -> tuple[int, int]:
    """Rows in a chunk and in a file."""
    rows, row_bytes = value.shape[0], math.prod(value.shape[1:]) * value.dtype.itemsize
    chunk = 1 if value.layered else table_rows(value.shape, value.dtype)
    return chunk, min(max(1, SHARD_BYTES // (chunk * row_bytes)) * chunk, rows)


def _spec(path: Path, value: Deferred, chunk: int, shard: int) -> dict[str, Any]:
    values = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [chunk, *value.shape[1:]],
        "codecs": [values],
        "index_codecs": [values, {"name": "crc32c"}],
    }
    return {
        "driver": "zarr3",
        "kvstore": storage.kvstore(path),
        "metadata": {
            "shape": value.shape,
            "data_type": value.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *value.shape[1:]]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        # A chunk of zeros must be there, so that a lost one can be told.
        "store_data_equal_to_fill_value": True,
    }


def _shards(value: Deferred, shard: int, kept: Collection[int]) -> Iterator[tuple[int, np.ndarray]]:
    """First rows and values of every shard but the kept ones, put together from the parts that it takes."""
    needed = (
        (rows, read) for rows, read in value.parts if any(_first(cut, shard) not in kept for cut in _cuts(rows, shard))
    )
    # As many parts in memory as threads have in work, and the one that is being written.
    parts = in_order(lambda part: (part[0], part[1]()), needed, value.threads, value.threads)
    filled, gathered = 0, None
    for rows, values in parts:
        for cut in _cuts(rows, shard):
            start = _first(cut, shard)
            if start in kept:
                continue
            piece = values[cut.start - rows.start : cut.stop - rows.start]
            size = min(shard, value.shape[0] - start)
            if len(piece) == size:
                yield start, np.ascontiguousarray(piece, value.dtype)
                continue
            gathered = np.empty((size, *value.shape[1:]), value.dtype) if gathered is None else gathered
            gathered[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled == size:
                yield start, gathered
                filled, gathered = 0, None


def _first(cut: slice, shard: int) -> int:
    """The first row of the shard that holds some rows."""
    return cut.start - cut.start % shard


def _cuts(rows: slice, shard: int) -> Iterator[slice]:
    """Rows cut where shards end."""
    start = rows.start
    while start < rows.stop:
        stop = min(start - start % shard + shard, rows.stop)
        yield slice(start, stop)
        start = stop


def _checksums(values: np.ndarray, chunk: int) -> list[str]:
    return [checksum(values[start : start + chunk]) for start in range(0, len(values), chunk)]


class StoredArray:
    """An array on disk.

    Args:
      weights: the folder of arrays.
      name: the array's.
      sums: the checksum of every chunk, in order; None for a checkpoint of version 1, which has none.

    Raises:
      HeadshareError: it cannot be opened, or there are not as many checksums as fit its shape.
    """

    def __init__(self, weights: Path, name: str, sums: list[str] | None):
        self.weights, self.name, self.sums = weights, name, sums
        spec = {
            "driver": "zarr" if sums is None else "zarr3",
            "kvstore": storage.kvstore(weights / name),
            # A lost chunk must be an error, never zeros.
            "fill_missing_data_reads": False,
        }
        try:
            self._array = ts.open(spec, open=True).result()
        except UNREADABLE as error:
            raise self._refusal(error) or HeadshareError(
                f"{weights} has no readable array {name}; the copy is incomplete, make it again."
            ) from error
        self.shape: tuple[int, ...] = self._array.shape
        self.type: str = self._array.dtype.name
        if sums is not None and (not self.shape or not sums or self.shape[0] % len(sums)):
            raise HeadshareError(f"The {len(sums)} checksums of {name} do not fit its shape {list(self.shape)}.")
        layout: Any = self._array.chunk_layout
        # Rows of the leading axis that are stored in a file, and in a chunk.
        self._shard_rows: int = layout.write_chunk.shape[0]
        self._chunk_rows: int = layout.read_chunk.shape[0] if sums is None else self.shape[0] // len(sums)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._array.dtype.numpy_dtype)

    def read(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Some rows of the leading axis, in whole chunks.

        Raises:
          HeadshareError: they cannot be read, or a chunk does not have its checksum.
        """
        try:
            values = np.asarray(self._array[rows].read().result())
        except UNREADABLE as error:
            raise self._refusal(error) or HeadshareError(
                f"{self.weights / self.name} is incomplete or corrupt ({error}); copy or make it again."
            ) from error
        if changed := self._changed(values, rows):
            raise HeadshareError(f"{self.weights.parent} is damaged: {named(changed)}; copy or make it again.")
        return values

    def read_within(self, rows: Sequence[int]) -> np.ndarray:
        """Some rows of the leading axis, ascending, wherever chunks begin and end; errors as of `read`."""
        chunk = self._chunk_rows
        first, stop = rows[0] // chunk * chunk, min(-(-(rows[-1] + 1) // chunk) * chunk, self.shape[0])
        values = self.read(slice(first, stop))
        return values if len(rows) == len(values) else values[np.asarray(rows) - first]

    def damaged(self, rows: slice) -> list[str]:
        """What of some rows, whole chunks, cannot be read or was changed."""
        try:
            return self._changed(np.asarray(self._array[rows].read().result()), rows)
        except UNREADABLE as error:
            if refusal := self._refusal(error):
                raise refusal from error
            return [f"{self.weights.name}/{self.name} is incomplete or corrupt ({error})"]

    def _refusal(self, error: Exception) -> HeadshareError | None:
        """What an error says of a bucket rather than of what lies there."""
        return storage.refusal_at(error, self.weights)

    def _changed(self, values: np.ndarray, rows: np.ndarray | slice) -> list[str]:
        """The chunks that do not have their checksums."""
        if self.sums is None:
            return []
        chunk = self._chunk_rows
        starts = np.arange(self.shape[0])[rows][::chunk].tolist()
        found = zip(starts, _checksums(np.ascontiguousarray(values), chunk), strict=True)
        return [self._place(start) for start, digest in found if digest != self.sums[start // chunk]]

    def _place(self, start: int) -> str:
        """Where a chunk lies, in words."""
        file = "/".join(map(str, ["c", start // self._shard_rows, *[0] * (len(self.shape) - 1)]))
        stop = start + self._chunk_rows
        which = f"row {start}" if stop - start == 1 else f"rows {start} to {stop - 1}"
        return f"{which} of {self.name} in {self.weights.name}/{self.name}/{file}"

    @property
    def chunks(self) -> int:
        """How many chunks it is stored in."""
        return -(-self.shape[0] // self._chunk_rows)

    def shards(self) -> Iterator[slice]:
        """Rows that lie in a file together."""
        for start in range(0, self.shape[0], self._shard_rows):
            yield slice(start, min(start + self._shard_rows, self.shape[0]))
