"""Packed blocks of tokens on disk or in a bucket: records of one size with a checksum each, read as they are used.

A record holds a block's tokens, as 16-bit numbers where the vocabulary allows it and as 32-bit numbers otherwise, a bit
for every token that begins a document, and the checksum of both. So a token takes 2.1 or 4.1 bytes.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from headshare_jax.convert import storage
from headshare_jax.errors import TryAgain

# The records, and the document that is written last and says what they are.
RECORDS, DOCUMENT = "blocks.packed", "blocks.json"
_FORMAT = "headshare-blocks-3"


@dataclass(frozen=True, eq=False)
class Blocks:
    """The packed blocks of one text.

    Attributes:
      folder: where they are stored.
      digest: key of the content: of the text, the tokenizer, and how they were packed.
      count: how many there are.
      seq_len: T, tokens in a block.
      token_type: of the stored tokens, `<u2` or `<u4`.
    """

    folder: Path
    digest: str
    count: int
    seq_len: int
    token_type: str

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments of blocks, int32 [*shape of numbers, T].

        A segment is the document of a token, counted from 1 in its block.

        Raises:
          TryAgain: a block is damaged, or the bucket was not reached.
        """
        records = self._stored(numbers.ravel())
        for number, record, kept in zip(numbers.ravel(), records, records["sum"], strict=True):
            if _checksum(record) != kept:
                with suppress(OSError):
                    (self.folder / DOCUMENT).unlink()
                raise TryAgain(
                    f"Block {number} of the packed text in {self.folder} is damaged; it is made anew at the next start."
                )
        shape = (*numbers.shape, self.seq_len)
        begins = np.unpackbits(records["begins"], axis=1, count=self.seq_len)
        segments = 1 + np.cumsum(begins, axis=1, dtype=np.int32)
        return records["tokens"].astype(np.int32).reshape(shape), segments.reshape(shape)

    def _stored(self, numbers: np.ndarray) -> np.ndarray:
        kind, path = _record(self.seq_len, self.token_type), self.folder / RECORDS
        if not storage.in_bucket(path):
            return self._mapped[numbers]
        starts = [int(number) * kind.itemsize for number in numbers]
        return np.frombuffer(storage.read_ranges(path, starts, kind.itemsize), kind)

    @cached_property
    def _mapped(self) -> np.ndarray:
        return np.memmap(self.folder / RECORDS, _record(self.seq_len, self.token_type), "r")


def stored(folder: Path, digest: str) -> Blocks | None:
    """The blocks in a folder, by its document and the size of its records; None unless they are whole."""
    try:
        with storage.reached(folder):
            said = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        blocks = Blocks(folder, digest, said["blocks"], said["seq_len"], said["token_type"])
        size = blocks.count * _record(blocks.seq_len, blocks.token_type).itemsize
        whole = said["format"] == _FORMAT and storage.size(folder / RECORDS) == size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return blocks if whole else None


def write(
    folder: Path, packed: Iterable[tuple[np.ndarray, np.ndarray]], *, seq_len: int, largest: int, source: str
) -> None:
    """Fills a folder with blocks.

    Args:
      folder: an empty one.
      packed: tokens, whole numbers [some, T], and which of them begin a document, bool [some, T].
      seq_len: T.
      largest: no token's number is above it.
      source: what they are made from, for those who look into the folder.
    """
    token_type, count = "<u2" if largest < 2**16 else "<u4", 0
    with (folder / RECORDS).open("wb") as file:
        for tokens, begins in packed:
            records = np.zeros(len(tokens), _record(seq_len, token_type))
            records["tokens"], records["begins"] = tokens, np.packbits(begins, axis=1)
            records["sum"] = [_checksum(record) for record in records]
            file.write(records.tobytes())
            count += len(records)
    document = {"format": _FORMAT, "source": source, "blocks": count, "seq_len": seq_len, "token_type": token_type}
    (folder / DOCUMENT).write_text(json.dumps(document, indent=2), encoding="utf-8")


def _record(seq_len: int, token_type: str) -> np.dtype[Any]:
    return np.dtype([("tokens", token_type, seq_len), ("begins", "u1", -(-seq_len // 8)), ("sum", "<u8")])


def _checksum(record: np.void) -> int:
    """xxh3-64 of a record without its checksum."""
    return xxhash.xxh3_64_intdigest(record.tobytes()[:-8])
