"""Training data: texts packed into blocks once, their mixture, and the batches of every step."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grain
import numpy as np

from headshare_jax.convert import storage, text
from headshare_jax.convert.atomic import new_directory, own_file
from headshare_jax.convert.partial import temporary_folder
from headshare_jax.convert.tokenizer import save as save_tokenizer
from headshare_jax.errors import HeadshareError
from headshare_jax.train import blocks as packed
from headshare_jax.train.blocks import Blocks
from headshare_jax.train.packing import no_threads_in_tokenizers, pack
from headshare_jax.train.recipe import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# To be raised when the same text is packed into other blocks than before; checkpoints of a run know its data by it.
_FORMAT = 2
# In the cache: the digests of files that were read, by their place, size and time.
_KNOWN = "known"
_DIGEST = re.compile(r"\w+ [0-9a-f]{64}")


def prepare(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    text_field: str = "text",
    streaming: bool = False,
    workers: int | None = None,
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Blocks:
    """Tokenises and packs a text as `packing.pack` does, or finds that done in the cache.

    A row of a JSONL or parquet file or of a data set is one document, a text file as a whole is one (tokenised in
    pieces that end with a line). A file is read through for its digest once; from then on its place, size and time
    stand for it.

    Args:
      source: as for `headshare_jax.convert.text.open_corpus`; a data set's split is `train` by default.
      tokenizer: it adds no other special tokens.
      seq_len: T, tokens in a block.
      text_field: field or column that holds the text of a row.
      streaming: a data set is read from its hub as it comes, and no copy is kept.
      workers: threads that tokenise, by default one a core; the result does not depend on them.
      cache: folder of all packed texts, made if absent; each is in a folder of its own, named by its digest. One that
        is not whole is made anew.
      progress: called with what has been read and the whole: bytes of a text or JSONL file, rows of any other.

    Raises:
      HeadshareError: a text that cannot be read or is shorter than a block, or a cache that cannot be written.
    """
    corpus = text.open_corpus(source, field=text_field, streaming=streaming)
    try:
        storage.make_folder(cache)
        parts = [_FORMAT, _digest(corpus, cache), _tokenizer_digest(tokenizer), seq_len, text_field]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        folder = cache / digest
        if (found := packed.stored(folder, digest)) is None:
            made = pack(corpus, tokenizer, seq_len=seq_len, source=source, workers=workers, progress=progress)
            largest = max(tokenizer.get_vocab().values())
            try:
                with new_directory(folder, overwrite=folder.exists()) as unfinished, no_threads_in_tokenizers():
                    packed.write(unfinished, made, seq_len=seq_len, largest=largest, source=source)
            except HeadshareError:
                # Another process may have been first to write the same.
                if packed.stored(folder, digest) is None:
                    raise
            found = packed.stored(folder, digest)
            assert found is not None
    except OSError as error:
        raise HeadshareError(f"The cache {cache} cannot be made: {error.strerror}.") from error
    return found


def mixture(
    settings: Data,
    tokenizer: "PreTrainedTokenizerBase",
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "Mixture":
    """The texts of a recipe, each prepared; raises HeadshareError as `prepare`."""
    how = partial(
        prepare,
        seq_len=settings.seq_len,
        streaming=settings.streaming,
        workers=settings.workers,
        cache=cache,
        progress=progress,
    )
    parts = [how(name, tokenizer, text_field=field) for name, field, _ in _sources(settings)]
    return Mixture(tuple(parts), tuple(weight for *_, weight in _sources(settings)))


def check_length(settings: Data, tokenizer: "PreTrainedTokenizerBase", windows: int) -> None:
    """Reads as much of each text as a mixture's first blocks take, or a block; writes nothing.

    Args:
      settings: the texts, and how they are packed.
      tokenizer: as for `prepare`.
      windows: blocks that a refit takes.

    Raises:
      HeadshareError: a text that cannot be read, or is shorter.
    """
    for (name, field, _), share in zip(_sources(settings), _shares(settings, windows), strict=True):
        corpus, blocks = text.open_corpus(name, field=field, streaming=settings.streaming), 0
        for tokens, _ in pack(corpus, tokenizer, seq_len=settings.seq_len, source=name, workers=1):
            blocks += len(tokens)
            if blocks >= max(1, share):
                break
        if blocks < share:
            raise HeadshareError(
                f"sharing.refit_windows ({windows}) takes {share} blocks of seq_len {settings.seq_len} from {name}, "
                f"which has {blocks}; lower it, or give more text."
            )


def _sources(settings: Data) -> list[tuple[str, str, float]]:
    """Every text's name, the field that holds it, and its weight."""
    return [(each.source, each.text_field or settings.text_field, each.weight) for each in settings.train]


def _shares(settings: Data, count: int) -> list[int]:
    """How many of a mixture's first blocks come from each text."""
    turns = _in_turns(
        [grain.MapDataset.source([place]) for place in range(len(settings.train))],
        [source.weight for source in settings.train],
    )
    return np.bincount([turns[place] for place in range(count)], minlength=len(settings.train)).tolist()


def _digest(corpus: text.Corpus, cache: Path) -> str:
    """The corpus's digest, remembered in the cache where that takes reading a file."""
    if corpus.version is None:
        return corpus.digest()
    known = cache / _KNOWN / f"{hashlib.sha256(corpus.version.encode()).hexdigest()}.txt"
    if known.is_file() and _DIGEST.fullmatch(digest := known.read_text(encoding="utf-8")):
        return digest
    digest = corpus.digest()
    storage.make_folder(known.parent)
    with own_file(known) as unfinished:
        unfinished.write_text(digest, encoding="utf-8")
    return digest


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


@dataclass(frozen=True, eq=False)
class Mixture:
    """Blocks of one text, or of several that take turns.

    Attributes:
      parts: the blocks of every text; they are numbered through, one text after another.
      weights: how often a block comes from each, against the others.
    """

    parts: tuple[Blocks, ...]
    weights: tuple[float, ...] = (1.0,)

    @property
    def digest(self) -> str:
        """Key of the content; checkpoints of a run know its data by it."""
        if len(self.parts) == 1:
            return self.parts[0].digest
        parts = [[part.digest, weight] for part, weight in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments of blocks, as `Blocks.read` gives them."""
        starts = np.cumsum([0, *(len(part) for part in self.parts)])
        part_of = np.searchsorted(starts, numbers, "right") - 1
        shape = (*numbers.shape, self.parts[0].seq_len)
        tokens, segments = np.empty(shape, np.int32), np.empty(shape, np.int32)
        for place in np.unique(part_of):
            here = part_of == place
            tokens[here], segments[here] = self.parts[place].read(numbers[here] - starts[place])
        return tokens, segments

    def first(self, count: int) -> np.ndarray:
        """Tokens of the first blocks, int32 [count, T]: each text's first, in turns."""
        return self.read(np.array([self.order(None)[place] for place in range(count)]))[0]

    def order(self, seed: int | None) -> grain.MapDataset:
        """Numbers of blocks, for ever: the texts in turns, each in random order anew in every epoch of its own.

        Args:
          seed: of the order; None for the blocks as they come.
        """
        ends = np.cumsum([len(part) for part in self.parts]).tolist()
        turns = [grain.MapDataset.range(end - len(part), end) for end, part in zip(ends, self.parts, strict=True)]
        if seed is not None:
            # Grain takes seed + epoch for an epoch's seed: seeds in a row would give the same orders one epoch apart.
            seeds = np.random.SeedSequence(seed).generate_state(len(turns)).tolist()
            turns = [blocks.shuffle(seed=mixed) for blocks, mixed in zip(turns, seeds, strict=True)]
        return _in_turns(turns, self.weights)


def _in_turns(parts: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
    """Elements of data sets in turns, for ever; grain's mixing takes whole numbers, of which the least is 100."""
    turns = [part.repeat() for part in parts]
    return turns[0] if len(turns) == 1 else grain.MapDataset.mix(turns, weights)


class Batches:
    """The batches of every step, in the mixture's order, for ever.

    Which blocks a step sees follows from the seed and the step alone: there is no position to save, and a run resumes
    exactly, with any number of hosts. Every block of a text comes once before any comes again; a batch may lie across
    two epochs.
    """

    def __init__(self, blocks: Mixture, *, batch_size: int, accumulate: int, seed: int) -> None:
        """Orders the blocks.

        Args:
          blocks: what to train on.
          batch_size: B, blocks in a step.
          accumulate: A, parts that a step's batch is cut into; it divides B.
          seed: of the order, not negative.
        """
        self._blocks, self._accumulate = blocks, accumulate
        self._order = blocks.order(seed).batch(batch_size)

    def at(self, step: int, rows: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments of a step, int32 [A, B / A, T].

        Args:
          step: counted from 0.
          rows: the rows wanted of every part, of B / A; no other is read.
        """
        return self._blocks.read(self._order[step].reshape(self._accumulate, -1)[:, rows])

    def stream(
        self, start: int, stop: int, rows: slice | np.ndarray = slice(None)
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The steps from `start` up to `stop`, as `at` gives them, read a little ahead."""
        steps = grain.MapDataset.range(start, stop).map(lambda step: self.at(step, rows))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
