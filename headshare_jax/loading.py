"""Models, tokenizers and texts by name."""

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import jax
import numpy as np
from jax.sharding import Mesh

from headshare_jax import convert
from headshare_jax.calibration.overlap import Overlap, TextRuns
from headshare_jax.calibration.windows import calibration_windows, spread_windows, tokens_digest, turns
from headshare_jax.convert import storage
from headshare_jax.convert import text as corpora
from headshare_jax.convert import tokenizer as tokenizers
from headshare_jax.errors import HeadshareError
from headshare_jax.model.llama import Llama
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import cast
from headshare_jax.typed import typed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import TypeIs

# A tokenizer, or the name of a model that carries one.
AnyTokenizer = Union[str, Path, "PreTrainedTokenizerBase"]
# Tokens that a method is calibrated on, unless others are asked for.
CALIBRATION_TOKENS = 49152
# Windows that models are measured on.
MEASURED_WINDOWS = 16
# A text by name, as for `convert.text.open_corpus`, or its token ids.
Text = str | Path | np.ndarray
# One text, or several, each with its weight.
Texts = Text | Sequence[tuple[Text, float]]


@typed
def load(
    src: str | Path | WeightSource,
    *,
    dtype: str | None = None,
    compute_dtype: str = "float32",
    remat: str = "none",
    mesh: Mesh | None = None,
) -> Llama:
    """Loads a model; peak memory is its own size plus one parameter.

    Args:
      src: native or Hugging Face folder, GGUF file, hub id, or an opened checkpoint.
      dtype: type to store parameters in (`float32`, `bfloat16`, `float16`); by default the checkpoint's own.
      compute_dtype: `float32` or `bfloat16`.
      remat: as in `Llama`.
      mesh: devices to lie on, each with its part, as of `model.mesh.make_mesh`; by default one.

    Raises:
      HeadshareError: as `open_checkpoint`, or a type that is none of these.

    Examples:
      >>> model = hs.load("my-llama")
      >>> model.config.num_layers, model.config.num_heads
      (3, 4)
    """
    source = convert.open_checkpoint(src) if storage.is_name(src) else src
    return Llama.of(cast(source, dtype), mesh=mesh, compute_dtype=compute_dtype, remat=remat)


def to_decode(source: WeightSource) -> Llama:
    """A model in the type that decodes fastest: float32 on a CPU, which converts 16-bit weights for every token."""
    if isinstance(source, Llama):
        return source
    return load(source, dtype="float32" if jax.default_backend() == "cpu" else None)


@typed
def load_tokenizer(src: str | Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a model.

    Args:
      src: as for `load`: native or Hugging Face folder, GGUF file or hub id.

    Raises:
      HeadshareError: there is no such model, or it carries no tokenizer that can be read.

    Examples:
      >>> tokenizer = hs.load_tokenizer("my-llama")
      >>> tokenizer.decode(tokenizer("Once upon a time").input_ids)
      'Once upon a time'
    """
    return tokenizers.load(convert.tokenizer_place(src))


@dataclass(frozen=True)
class TextPart:
    """What is taken of one text.

    Attributes:
      name: as it was given.
      digest: of the whole text; of the windows, where it was given as tokens.
      windows_wt: int32 [W, T], its first windows.
      held_out_wt: int32 [W', T], the windows after them, which no method sees; there may be none.
      weight: how much of it was asked for, against the other texts.
    """

    name: str
    digest: str
    windows_wt: np.ndarray
    held_out_wt: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True)
class CalibrationText:
    """The text that a method is calibrated on: one, or several whose windows take turns by their weights.

    Attributes:
      parts: what was taken of each.
    """

    parts: tuple[TextPart, ...]

    @property
    def name(self) -> str:
        """The names as they were given."""
        return " and ".join(part.name for part in self.parts)

    @property
    def digest(self) -> str:
        """Of the whole text; of several, of their windows."""
        return self.parts[0].digest if len(self.parts) == 1 else tokens_digest(self.windows_wt)

    @property
    def windows_wt(self) -> np.ndarray:
        """int32 [W, T], what is calibrated on."""
        return self._in_turns([part.windows_wt for part in self.parts], [0] * len(self.parts))

    @property
    def held_out_wt(self) -> np.ndarray:
        """int32 [W', T], windows that no method sees, in the same turns; there may be none."""
        return self._in_turns([part.held_out_wt for part in self.parts], [len(part.windows_wt) for part in self.parts])

    def _in_turns(self, windows: Sequence[np.ndarray], after: Sequence[int]) -> np.ndarray:
        """Windows of every part in the order of their turns, so many of each being taken already."""
        order = turns([part.weight for part in self.parts], sum(after) + sum(map(len, windows)))[sum(after) :]
        mixed_wt = np.concatenate(windows)
        for place, part_wt in enumerate(windows):
            mixed_wt[order == place] = part_wt
        return mixed_wt

    def overlap(self, tokens: np.ndarray, seq_len: int, max_windows: int | None = None) -> Overlap:
        """What of another text was in this one, and in which of several; see `TextRuns.overlap`."""
        found = self._runs.overlap(tokens, seq_len, max_windows)
        if len(self.parts) == 1:
            return found
        each = {part.name: TextRuns.of(part.windows_wt).overlap(tokens, seq_len, max_windows) for part in self.parts}
        return replace(found, texts=tuple(name for name, theirs in each.items() if theirs.share))

    @property
    def _runs(self) -> TextRuns:
        return TextRuns.of(*(part.windows_wt for part in self.parts))

    def to_json(self) -> dict[str, Any]:
        """What identifies text and windows, as plain data; `runs` tell whether another text was in them."""
        shape = list(self.windows_wt.shape)
        found = {"name": self.name, "digest": self.digest, "windows": shape, "runs": self._runs.to_json()}
        if len(self.parts) == 1:
            return found
        return found | {
            "texts": [
                {"name": part.name, "digest": part.digest, "weight": part.weight, "windows": len(part.windows_wt)}
                for part in self.parts
            ]
        }


def calibration_text(
    text: Texts,
    tokenizer: AnyTokenizer | None,
    count: int | None,
    seq_len: int,
    vocab_size: int,
    *,
    held_out: int = 0,
) -> CalibrationText:
    """Reads a calibration text, or several, no further than their windows reach.

    Args:
      text: its name or its tokens; or several, each with its weight: how many windows come from it, against the others.
      tokenizer: of the model; not needed for tokens.
      count: tokens to calibrate on; None for `CALIBRATION_TOKENS`, or what a single shorter text has.
      seq_len: tokens in a window.
      vocab_size: V.
      held_out: windows to hold out after those; of a shorter text, what is left of it, or where `count` is None an
        eighth of it.

    Raises:
      HeadshareError: no such text or tokenizer, too short a text, or a weight that is none.
    """
    if seq_len < 2:
        raise HeadshareError(f"seq_len must be at least 2, not {seq_len}.")
    texts = weighted(text)
    windows = (CALIBRATION_TOKENS if count is None else count) // seq_len
    if len(texts) > 1:
        return _several(texts, tokenizer, windows, seq_len, vocab_size, held_out)
    tokens, name, digest = _beginning(texts[0][0], tokenizer, (windows + held_out) * seq_len)
    there = len(tokens) // seq_len
    if count is None and there < windows + held_out:
        held_out = min(held_out, there // 8)
        windows = min(windows, max(there - held_out, 1))
    return CalibrationText((_part(tokens, name, digest, windows, held_out, seq_len, vocab_size),))


def weighted(text: Texts) -> list[tuple[Text, float]]:
    """Texts with their weights, of which a single one needs none.

    Raises:
      HeadshareError: it is neither a text nor pairs of a text and its weight, which is finite and above 0; or a text is
        named twice.
    """
    if _is_text(text):
        return [(text, 1.0)]
    pairs: list[tuple[Text, float]] = []
    given: Iterable[object] = text
    for pair in given:
        match pair:
            case (each, numbers.Real() as weight) if _is_text(each):
                pass
            case _:
                raise HeadshareError(
                    f"calibrate takes a text, or pairs of a text and its weight, not {pair!r:.99}.", option="calibrate"
                )
        if not 0 < float(weight) < math.inf:
            raise HeadshareError(
                f"The weight of {_called(each)} must be finite and above 0, not {float(weight):g}.", option="calibrate"
            )
        pairs.append((each, float(weight)))
    names = [str(each) for each, _ in pairs if not isinstance(each, np.ndarray)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not pairs:
        said = f"names {twice} twice; give it once, with a larger weight" if pairs else "names no text; give one"
        raise HeadshareError(f"calibrate {said}.", option="calibrate")
    return pairs


def _several(
    texts: Sequence[tuple[Text, float]],
    tokenizer: AnyTokenizer | None,
    windows: int,
    seq_len: int,
    vocab_size: int,
    held_out: int,
) -> CalibrationText:
    """Windows of several texts; what is held out ends where one of them does."""
    weights = [weight for _, weight in texts]
    order = turns(weights, windows + held_out)
    parts, read = [], []
    for place, (text, weight) in enumerate(texts):
        mine = np.flatnonzero(order == place)
        share = int(np.count_nonzero(mine < windows))
        tokens, name, digest = _beginning(text, tokenizer, len(mine) * seq_len)
        there = len(tokens) // seq_len
        if not share or there < share:
            raise HeadshareError(
                f"Of {windows} windows of {seq_len} tokens {share} are to come from {name} by its weight of "
                f"{weight:g}, which has {there}; give a longer text, another weight, or another calibrate_tokens."
                if share
                else f"None of {windows} windows comes from {name} by its weight of {weight:g}; raise it, or "
                "calibrate_tokens.",
                option=("calibrate", "calibrate_tokens"),
            )
        if there < len(mine):
            order = order[: mine[there]]
        read.append((tokens, name, digest, share))
    for place, (tokens, name, digest, share) in enumerate(read):
        left = int(np.count_nonzero(order[windows:] == place))
        parts.append(_part(tokens, name, digest, share, left, seq_len, vocab_size, weights[place]))
    return CalibrationText(tuple(parts))


def _part(
    tokens: np.ndarray,
    name: str,
    digest: str | None,
    windows: int,
    held_out: int,
    seq_len: int,
    vocab_size: int,
    weight: float = 1.0,
) -> TextPart:
    """So many windows of a text's tokens, and as many of those held out as there are."""
    windows_wt = calibration_windows(tokens, windows, seq_len, vocab_size)
    rest = np.asarray(tokens[windows * seq_len :])
    held_out = min(held_out, len(rest) // seq_len)
    held_out_wt = (
        calibration_windows(rest, held_out, seq_len, vocab_size) if held_out else np.zeros((0, seq_len), np.int32)
    )
    return TextPart(name, digest or tokens_digest(windows_wt), windows_wt, held_out_wt, weight)


def _is_text(value: object) -> "TypeIs[Text]":
    return storage.is_name(value) or isinstance(value, np.ndarray)


def _called(text: Text) -> str:
    return "token ids" if isinstance(text, np.ndarray) else str(text)


def _beginning(text: Text, tokenizer: AnyTokenizer | None, count: int) -> tuple[np.ndarray, str, str | None]:
    """A text's first tokens, at most so many, its name, and the digest of all of it if it is not tokens itself."""
    if isinstance(text, np.ndarray):
        return text[:count], _called(text), None
    corpus = corpora.open_corpus(str(text))
    return _first_tokens(corpus, tokenizer_of(tokenizer), count), str(text), corpus.digest()


def _first_tokens(corpus: corpora.Corpus, tokenizer: "PreTrainedTokenizerBase", count: int) -> np.ndarray:
    """A corpus's first tokens, int32, at most so many; it is read no further."""
    tokens: list[int] = []
    for piece in corpus.pieces():
        tokens += tokenizers.encode(tokenizer, piece.text)
        if len(tokens) >= count:
            break
    return np.asarray(tokens[:count])


def text_tokens(text: Text, tokenizer: AnyTokenizer | None, *, field: str = "text") -> np.ndarray:
    """A whole text as token ids, int32 [tokens]; token ids as they are.

    Args:
      text, field: as for `convert.text.read`.
      tokenizer: a tokenizer, or the model that carries it.

    Raises:
      HeadshareError: no such text or tokenizer, or an empty text.
    """
    if isinstance(text, np.ndarray):
        return text
    return np.asarray(tokenizers.encode(tokenizer_of(tokenizer), corpora.read(str(text), field=field)), np.int32)


def measured_windows(text: Text, tokenizer: AnyTokenizer | None, seq_len: int, vocab_size: int) -> np.ndarray:
    """Windows of a text to measure models on, int32 [W, T]; raises what `text_tokens` and `spread_windows` do."""
    return spread_windows(text_tokens(text, tokenizer), MEASURED_WINDOWS, seq_len, vocab_size)


def tokenizer_of(given: AnyTokenizer | None) -> "PreTrainedTokenizerBase":
    """A tokenizer, or that of a model by name; raises HeadshareError where none is given."""
    if given is None:
        raise HeadshareError("A text needs the tokenizer of the model; give it, or token ids.", option="tokenizer")
    return load_tokenizer(given) if storage.is_name(given) else given
