"""Files of tensors that are written piece after piece, so that who was killed can go on.

On this machine each tensor is written where it belongs. To a bucket's file nothing is added: there the pieces, of
several tensors, are objects beside it, which the bucket joins at the end.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from headshare_jax.ahead import in_order
from headshare_jax.convert import storage
from headshare_jax.convert.keys import Reads
from headshare_jax.convert.written import Written

# Of a bucket's piece, the least; S3 joins none below 5 MB but the last, and none above 5 GiB.
PIECE_BYTES = 64 * 2**20
_MOST_TENSOR_BYTES = 4 * 2**30


@dataclass(frozen=True)
class _Piece:
    """Some of a file.

    Attributes:
      part: what notes call it.
      names: of the tensors in it.
      start, stop: its bytes, counted from where the file begins.
    """

    part: str
    names: tuple[str, ...]
    start: int
    stop: int


def write(
    path: Path,
    head: bytes,
    sizes: Mapping[str, int],
    reads: Callable[[str], Reads],
    notes: Written | None = None,
    *,
    threads: int = 0,
) -> None:
    """Writes a file; in memory are one read, those that threads are ahead, and one piece that is verified.

    Args:
      path: the file, which may be there as far as a process that was killed had come.
      head: what comes before the tensors.
      sizes: bytes of every tensor by its name, in file order; a smaller one is filled up with zeros.
      reads: what gives a tensor, by its name.
      notes: of what was written before; what still has the checksums that they tell is kept. None by default.
      threads: that read tensors ahead.

    Raises:
      OSError, HeadshareError: it cannot be written.
    """
    notes = notes or Written()
    pieces = list(_cut(path, len(head), sizes, notes))
    joined, beside = storage.in_bucket(path) and len(pieces) > 1, path.with_name(f".{path.name}.pieces")
    if joined and all(_is_there(piece, path, piece.start, notes) for piece in pieces):
        storage.remove(beside)
        return
    if not storage.in_bucket(path):
        with path.open("ab") as file:
            file.truncate(min(file.tell(), pieces[-1].stop))
    places = {piece: (beside / f"{piece.start}", 0) if joined else (path, piece.start) for piece in pieces}
    missing = [piece for piece, place in places.items() if not _is_there(piece, *place, notes)]
    of_tensors = {name: reads(name) for piece in missing for name in piece.names}
    values = in_order(lambda read: read(), chain.from_iterable(of_tensors.values()), threads, threads)
    for piece in missing:
        digest = xxhash.xxh3_64()
        with _opened(*places[piece]) as file:
            for content in _contents(piece, head, sizes, of_tensors, values):
                file.write(content)
                digest.update(content)
        notes.add(piece.part, [digest.hexdigest()])
    if joined:
        storage.join([place for place, _ in places.values()], path)
        storage.remove(beside)


def _cut(path: Path, begin: int, sizes: Mapping[str, int], notes: Written) -> Iterator[_Piece]:
    """Pieces of some tensors each, the first with what comes before them; a bucket's file that is not noted is one."""
    least = 0
    if storage.in_bucket(path):
        fit = notes.lasting and max(sizes.values()) <= _MOST_TENSOR_BYTES
        least = PIECE_BYTES if fit else begin + sum(sizes.values())
    start, stop, names = 0, begin, []
    for number, (name, size) in enumerate(sizes.items(), 1):
        stop += size
        names.append(name)
        if stop - start >= least or number == len(sizes):
            yield _Piece(f"{path.name}/{start}", tuple(names), start, stop)
            start, names = stop, []


def _is_there(piece: _Piece, file: Path, offset: int, notes: Written) -> bool:
    """Whether a piece lies in a file, from a byte on, as it was noted."""
    sums, end = notes.sums(piece.part), offset + piece.stop - piece.start
    try:
        if sums is None or storage.size(file) < end:
            return False
        return sums == [xxhash.xxh3_64_hexdigest(storage.read_range(file, offset, end))]
    except FileNotFoundError:
        return False


def _contents(
    piece: _Piece, head: bytes, sizes: Mapping[str, int], reads: Mapping[str, Reads], values: Iterator[np.ndarray]
) -> Iterator[bytes | memoryview]:
    if not piece.start:
        yield head
    for name in piece.names:
        left = sizes[name]
        for rows in islice(values, len(reads[name])):
            content = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
            left -= len(content)
            yield content.data
        assert left >= 0
        yield bytes(left)


@contextmanager
def _opened(file: Path, offset: int) -> Iterator[IO[bytes]]:
    with file.open("wb" if storage.in_bucket(file) else "r+b") as opened:
        if offset:
            opened.seek(offset)
        yield opened
