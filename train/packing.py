"""Text into blocks of tokens: documents tokenised in threads, and packed back to back."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from headshare_jax.ahead import in_order
from headshare_jax.convert.text import Corpus, Piece
from headshare_jax.convert.tokenizer import encode_each
from headshare_jax.errors import HeadshareError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Step = Callable[[int, int], None]

# Characters that are tokenised at a time.
_BATCH_CHARACTERS = 2**20


def pack(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    source: str,
    workers: int | None = None,
    progress: Step = lambda done, total: None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens of blocks, int64 [some, T], and which of them begin a document, bool [some, T].

    Each document is followed by the tokenizer's end-of-sequence token, if it has one. They are packed back to back: one
    that crosses a block's border goes on in the next block, as document 1 there. What is left after the last whole
    block is dropped.

    Args:
      corpus: the documents.
      tokenizer: it adds no other special tokens.
      seq_len: T.
      source: the corpus's name.
      workers: threads that tokenise, by default one a core; the result does not depend on them.
      progress: called with what has been read of the corpus, and the whole.

    Raises:
      HeadshareError: the corpus cannot be read, or is shorter than a block.
    """
    rest, any_block = np.empty((2, 0), np.int64), False
    for pair in _encoded(corpus, tokenizer, workers or os.cpu_count() or 1, progress):
        pair = np.concatenate([rest, pair], axis=1)
        whole = pair.shape[1] - pair.shape[1] % seq_len
        rest, any_block = pair[:, whole:], any_block or whole > 0
        tokens, documents = pair[:, :whole].reshape(2, -1, seq_len)
        yield tokens, np.diff(documents, axis=1, prepend=documents[:, :1]) != 0
    if not any_block:
        raise HeadshareError(
            f"{source} has {rest.shape[1]} tokens, but one block takes seq_len {seq_len}; give more text or a smaller "
            "seq_len."
        )


def _encoded(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", workers: int, progress: Step
) -> Iterator[np.ndarray]:
    """Tokens and the numbers of their documents, int64 [2, some], in order."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(batch: list[tuple[int, Piece]]) -> tuple[np.ndarray, int]:
        texts = [piece.text for _, piece in batch]
        rows = encode_each(tokenizer, texts)
        rows = [row + end * piece.last for row, (_, piece) in zip(rows, batch, strict=True)]
        documents = np.repeat([number for number, _ in batch], [len(row) for row in rows])
        return np.stack([np.concatenate([np.array(row, np.int64) for row in rows]), documents]), batch[-1][1].done

    done = 0
    for pair, done in in_order(encode, _batches(corpus.pieces()), workers, 2 * workers):
        yield pair
        progress(done, max(done, corpus.size))
    size = max(done, corpus.size)
    progress(size, size)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[tuple[int, Piece]]]:
    """Pieces with the numbers of their documents, some at a time; empty documents are left out."""
    batch: list[tuple[int, Piece]] = []
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


@contextmanager
def no_threads_in_tokenizers() -> Iterator[None]:
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
