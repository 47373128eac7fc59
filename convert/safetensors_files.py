"""Safetensors files: reading tensor by tensor, and writing without holding more than one tensor in memory."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from headshare_jax.convert import pieces, storage
from headshare_jax.convert.keys import Cut, Reads
from headshare_jax.convert.tensor_files import TensorInfo
from headshare_jax.convert.written import Written
from headshare_jax.errors import HeadshareError

FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in FLOATS.items()} | {
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
}
# How values are read; those of FP8 as their bits.
_TYPES = {
    **FLOATS,
    **{name: np.dtype(np.uint8) for name in ("U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")},
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype(np.int8),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
# Bits of a value of every type that the format has.
_BITS = {name: 8 * dtype.itemsize for name, dtype in _TYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
# No header is larger, as the format has it.
_HEADER_BYTES = 100 * 10**6
_FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file.

    Attributes:
      type: of its values, as the format calls it.
      shape: its sizes.
      start, stop: its bytes, counted from where the file begins.
    """

    type: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsReader:
    """Tensors of safetensors files, in a folder or a bucket, read by their places in the file.

    No pages stay mapped, for they would count as memory.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self.entries: dict[str, Entry] = {}

    def infos(self) -> tuple[dict[str, TensorInfo], list[str]]:
        found: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for path in self.files:
            entries, unclear = header(path)
            problems += unclear
            for name, entry in entries.items():
                if name in found:
                    problems.append(f"{name} stands in both {found[name].file.name} and {path.name}")
                found[name] = TensorInfo(entry.shape, FLOATS.get(entry.type), path)
            self.entries |= entries
        return found, problems

    def read(self, info: TensorInfo, name: str, cut: Cut | None = None) -> np.ndarray:
        entry = self.entries[name]
        file, dtype, shape = info.file, _TYPES[entry.type], entry.shape
        if cut is None:
            return _values(file, entry.start, shape, dtype)
        if cut.axis:
            # Columns lie all over the file. Of a mapped one, the system reads the pages that hold them.
            whole = _values(file, entry.start, shape, dtype) if storage.in_bucket(file) else _mapped(file, entry, dtype)
            return cut.of(whole)
        row = math.prod(shape[1:]) * dtype.itemsize
        runs = [
            _values(file, entry.start + first * row, (last - first, *shape[1:]), dtype)
            for first, last in _runs(cut.slices)
        ]
        return runs[0] if len(runs) == 1 else np.concatenate(runs)


def _runs(slices: Iterable[slice]) -> Iterator[tuple[int, int]]:
    """First rows and ends of what lies side by side."""
    first = last = 0
    for part in slices:
        if part.start != last:
            if last > first:
                yield first, last
            first = part.start
        last = part.stop
    yield first, last


def _values(file: Path, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Values that lie side by side in a file, from a byte on."""
    with _explained(file):
        found = storage.read_array(file, start, math.prod(shape) * dtype.itemsize)
        return found.view(dtype).reshape(shape)


def _mapped(file: Path, entry: Entry, dtype: np.dtype[Any]) -> np.ndarray:
    with _explained(file):
        bits = np.memmap(file, np.uint8, "r", entry.start, (entry.stop - entry.start,))
        return np.asarray(bits).view(dtype).reshape(entry.shape)


def header(path: Path) -> tuple[dict[str, Entry], list[str]]:
    """Every tensor's place by its name, and what else is unclear in a file's header.

    Tensors must lie one after another and fill the file, as the format asks.

    Raises:
      HeadshareError: they do not, or it is no safetensors file.
    """
    with _explained(path):
        total = storage.size(path)
        length = int.from_bytes(storage.read_range(path, 0, 8), "little") if total > 8 else 0
        if not 0 < length <= min(_HEADER_BYTES, total - 8):
            raise ValueError(f"its header would have {length:,} bytes")
        pairs = json.loads(
            storage.read_range(path, 8, 8 + length).decode(), object_pairs_hook=list, parse_constant=_refused
        )
        if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
            raise ValueError("its header is no JSON object")
        for name, about in pairs:
            if name == "__metadata__" and not all(isinstance(text, str) for text in _object(about).values()):
                raise ValueError("its metadata are no texts")
        tensors = [(name, fields) for name, fields in pairs if name != "__metadata__"]
        found = {name: _entry(name, fields, 8 + length) for name, fields in tensors}
        _check_places(found, 8 + length, total)
    return found, list(_unclear(path, tensors))


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"its header holds {constant}, which is no number of JSON's")


def _entry(name: str, fields: Any, begin: int) -> Entry:
    """A tensor's entry; ValueError unless it is one."""
    said = _object(fields)
    # No name may hold half a surrogate pair.
    name.encode()
    kind, shape, places = str(said.get("dtype")), said.get("shape", ()), said.get("data_offsets", ())
    if not (kind in _BITS and _are_counts(shape) and _are_counts(places) and len(places) == 2):
        raise ValueError(f"the entry of `{name}` is no tensor's")
    bits = math.prod(shape) * _BITS[kind]
    if bits % 8 or places[1] - places[0] != bits // 8:
        raise ValueError(f"`{name}` has {places[1] - places[0]} bytes, and its shape and type ask for {bits / 8:g}")
    return Entry(kind, tuple(shape), begin + places[0], begin + places[1])


def _object(pairs: Any) -> dict[str, Any]:
    """A JSON object from its pairs; ValueError unless it is one, with every key once."""
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise ValueError("a part of its header is no JSON object")
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"keys stand twice among {', '.join(found)}")
    return found


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_places(found: Mapping[str, Entry], begin: int, total: int) -> None:
    """Raises ValueError unless tensors follow each other from where values begin up to the file's end."""
    end = begin
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(f"`{name}` begins at byte {entry.start:,}, and what lies before it ends at {end:,}")
        end = entry.stop
    if end != total:
        raise ValueError(f"its tensors end at byte {end:,}, and it has {total:,}")


def _unclear(path: Path, tensors: list[tuple[str, Any]]) -> Iterator[str]:
    """What a reader would pass over: of a name's entries all but the last, and what it does not know in one."""
    for name, count in Counter(name for name, _ in tensors).items():
        if count > 1:
            yield f"{name} stands more than once in {path.name}"
    for name, fields in tensors:
        unknown = {key for key, _ in fields}.difference(_FIELDS)
        if unknown:
            yield f"{name} in {path.name} has unknown fields ({', '.join(sorted(unknown))})"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        with storage.reached(path):
            yield
    except HeadshareError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise HeadshareError(
            f"{path} is truncated, corrupt or no safetensors file ({error}); fetch it again."
        ) from error


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
    reads: Callable[[str], Reads],
    notes: Written | None = None,
) -> None:
    """Writes one file; peak memory is as of `pieces.write`.

    Args:
      path: the file.
      layout: shape and type (float32, float16, bfloat16, int32 or uint8) of every tensor, by name, in file order.
      reads: what gives a tensor, by its name.
      notes: of what was written before, by a process that was killed; what lies there with the checksums that it
        noted is kept.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in layout.items()}
    for name, (shape, dtype) in layout.items():
        start, end = end, end + sizes[name]
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)

    def stored(name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        shape, dtype = layout[name]
        rows = read()
        assert rows.shape[1:] == shape[1:]
        return np.ascontiguousarray(rows, dtype)

    def stored_reads(name: str) -> Reads:
        return [partial(stored, name, read) for read in reads(name)]

    notes = notes or Written()
    pieces.write(path, len(text).to_bytes(8, "little") + text, sizes, stored_reads, notes, threads=notes.threads)
