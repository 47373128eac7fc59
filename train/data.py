"""Training data: documents packed into fixed blocks of tokens on disk, and their order, a pure function of the step."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grain
import numpy as np

from headshare_jax.convert import text
from headshare_jax.convert.atomic import new_directory
from headshare_jax.convert.partial import temporary_folder
from headshare_jax.convert.tokenizer import encode_each
from headshare_jax.convert.tokenizer import save as save_tokenizer
from headshare_jax.errors import HeadshareError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
R = TypeVar("R")

# To be raised when the same text is packed into other blocks than before; checkpoints of a run know its data by it.
_FORMAT = 2
# Little-endian int32 [n, 2, T]: tokens and segments of every block.
_BLOCKS, _DOCUMENT = "blocks.int32", "blocks.json"
# Characters that are tokenised at a time.
_BATCH_CHARACTERS = 2**20


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed blocks, read from disk as they are used.

    Attributes:
      tokens: int32 [n, T], read-only.
      segments: int32 [n, T], read-only; the document of every token, counted from 1 in its block; 0 is padding.
      digest: key of the content: of the text, the tokenizer, and how they were packed.
    """

    tokens: np.ndarray
    segments: np.ndarray
    digest: str


def prepare(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    text_field: str = "text",
    workers: int = 1,
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Blocks:
    """Tokenises and packs a text, or finds that done in the cache.

    A row of a JSONL or parquet file or of a data set is one document, a text file as a whole is one (tokenised in
    pieces that end with a line). Each is followed by the tokenizer's end-of-sequence token, if it has one. They are
    packed back to back: one that crosses a block's border goes on in the next block, as document 1 there. What is left
    after the last whole block is dropped.

    Args:
      source: as for `headshare_jax.convert.text.open_corpus`; a data set's split is `train` by default.
      tokenizer: it adds no other special tokens.
      seq_len: T, tokens in a block.
      text_field: field or column that holds the text of a row.
      workers: threads that tokenise; the result does not depend on them.
      cache: folder of all packed texts, made if absent; each is in a folder of its own, named by its digest. A damaged
        one is made anew.
      progress: called with what has been read and the whole: bytes of a text or JSONL file, rows of any other.

    Raises:
      HeadshareError: a text that cannot be read or is shorter than a block, or a cache that cannot be written.
    """
    corpus = text.open_corpus(source, field=text_field)
    parts = [_FORMAT, corpus.digest(), _tokenizer_digest(tokenizer), seq_len, text_field]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    folder = cache / digest
    if not _is_stored(folder):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with new_directory(folder, overwrite=folder.exists()) as partial, _no_threads_in_tokenizers():
                with (partial / _BLOCKS).open("wb") as file:
                    for blocks in _packed(_encoded(corpus, tokenizer, workers, progress), seq_len, source):
                        file.write(blocks.astype("<i4").tobytes())
                document = {"source": source, "sha256": text.sha256(partial / _BLOCKS)}
                (partial / _DOCUMENT).write_text(json.dumps(document, indent=2))
        except OSError as error:
            raise HeadshareError(f"The cache {cache} cannot be made: {error.strerror}.") from error
        except HeadshareError:
            # Another process may have been first to write the same.
            if not _is_stored(folder):
                raise
    stored = np.memmap(folder / _BLOCKS, "<i4", "r").reshape(-1, 2, seq_len)
    return Blocks(stored[:, 0], stored[:, 1], digest)


def count_blocks(
    source: str, tokenizer: "PreTrainedTokenizerBase", *, seq_len: int, text_field: str = "text", most: int = 1
) -> int:
    """Counts the blocks that a text gives; reads little further than the first `most`, and writes nothing.

    Args:
      source, tokenizer, seq_len, text_field: as for `prepare`.
      most: blocks that matter; a text that has more is not counted to its end.

    Raises:
      HeadshareError: a text that cannot be read or is shorter than a block.
    """
    corpus = text.open_corpus(source, field=text_field)
    count = 0
    for blocks in _packed(_encoded(corpus, tokenizer, 1, lambda done, total: None), seq_len, source):
        count += len(blocks)
        if count >= most:
            break
    return count


def _tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    if tokenizer.is_fast:
        # A tokenizer may be stored with these; calling it as here drops them, which is to leave its digest the same.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    with temporary_folder() as folder:
        save_tokenizer(tokenizer, folder)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        sums = [(str(file.relative_to(folder)), text.sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _is_stored(folder: Path) -> bool:
    """Whether a folder of the cache is there and undamaged."""
    try:
        return bool(json.loads((folder / _DOCUMENT).read_text())["sha256"] == text.sha256(folder / _BLOCKS))
    except (HeadshareError, OSError, ValueError, KeyError, TypeError):
        return False


def _packed(encoded: Iterable[np.ndarray], seq_len: int, source: str) -> Iterator[np.ndarray]:
    """Tokens and segments [some, 2, seq_len] from tokens and their documents' numbers, [2, some]."""
    rest, any_block = np.empty((2, 0), np.int64), False
    for pair in encoded:
        pair = np.concatenate([rest, pair], axis=1)
        whole = pair.shape[1] - pair.shape[1] % seq_len
        rest, any_block = pair[:, whole:], any_block or whole > 0
        tokens, documents = pair[:, :whole].reshape(2, -1, seq_len)
        begins = np.diff(documents, axis=1, prepend=documents[:, :1]) != 0
        yield np.stack([tokens, 1 + np.cumsum(begins, axis=1)], axis=1)
    if not any_block:
        raise HeadshareError(
            f"{source} has {rest.shape[1]} tokens, but one block takes seq_len {seq_len}; give more text or a smaller "
            "seq_len."
        )


def _encoded(
    corpus: text.Corpus, tokenizer: "PreTrainedTokenizerBase", workers: int, progress: Callable[[int, int], None]
) -> Iterator[np.ndarray]:
    """Tokens and the numbers of their documents, int64 [2, some], in order."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(batch: list[tuple[int, text.Piece]]) -> tuple[np.ndarray, int]:
        texts = [piece.text for _, piece in batch]
        rows = encode_each(tokenizer, texts)
        rows = [row + end * piece.last for row, (_, piece) in zip(rows, batch, strict=True)]
        documents = np.repeat([number for number, _ in batch], [len(row) for row in rows])
        return np.stack([np.concatenate([np.array(row, np.int64) for row in rows]), documents]), batch[-1][1].done

    for pair, done in _in_order(encode, _batches(corpus.pieces()), workers):
        yield pair
        progress(done, corpus.size)
    progress(corpus.size, corpus.size)


def _batches(pieces: Iterable[text.Piece]) -> Iterator[list[tuple[int, text.Piece]]]:
    """Pieces with the numbers of their documents, some at a time; empty documents are left out."""
    batch: list[tuple[int, text.Piece]] = []
    number = size = 0
    for piece in pieces:
        if piece.text:
            batch.append((number, piece))
            size += len(piece.text)
        number += piece.last
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """The function's values, computed in threads, for a few items ahead of the value that is wanted."""
    with ThreadPoolExecutor(workers) as threads:
        running: deque[Future[R]] = deque()
        for item in items:
            running.append(threads.submit(function, item))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        yield from (future.result() for future in running)


@contextmanager
def _no_threads_in_tokenizers() -> Iterator[None]:
    """Lets a call of a tokenizer use one thread instead of all cores, so that `workers` means what it says."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


class Batches:
    """The batches of every step, from all blocks in random order, anew in every epoch, for ever.

    Which blocks a step sees follows from the seed and the step alone: there is no position to save, and a run resumes
    exactly, with any number of hosts. Every block comes once in an epoch; a batch may lie across two epochs.
    """

    def __init__(self, blocks: Blocks, *, batch_size: int, accumulate: int, seed: int) -> None:
        """Orders the blocks.

        Args:
          blocks: what to train on.
          batch_size: B, blocks in a step.
          accumulate: A, parts that a step's batch is cut into; it divides B.
          seed: of the order, not negative.
        """
        self._blocks, self._accumulate = blocks, accumulate
        # Grain takes seed + epoch for an epoch's seed, so seeds in a row would give the same orders one epoch apart.
        mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(len(blocks.tokens)).shuffle(seed=mixed).repeat().batch(batch_size)

    def at(self, step: int, rows: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments of a step, int32 [A, B / A, T].

        Args:
          step: counted from 0.
          rows: the rows wanted of every part, of B / A; no other is read.
        """
        block_ab = self._order[step].reshape(self._accumulate, -1)[:, rows]
        return np.asarray(self._blocks.tokens[block_ab]), np.asarray(self._blocks.segments[block_ab])

    def stream(
        self, start: int, stop: int, rows: slice | np.ndarray = slice(None)
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The steps from `start` up to `stop`, as `at` gives them, read a little ahead."""
        steps = grain.MapDataset.range(start, stop).map(lambda step: self.at(step, rows))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
