"""Models, tokenizers and texts by name."""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Union

import jax
import numpy as np
from jax.sharding import Mesh

from headshare_jax import convert
from headshare_jax.calibration.own_text import check_window, own_text
from headshare_jax.calibration.text import CalibrationText, TextPart, is_own
from headshare_jax.calibration.windows import calibration_windows, spread_windows, turns
from headshare_jax.config import LlamaConfig
from headshare_jax.convert import storage
from headshare_jax.convert import text as corpora
from headshare_jax.convert import tokenizer as tokenizers
from headshare_jax.convert.card import OWN_TEXT
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


def calibration_text(
    text: Texts,
    tokenizer: AnyTokenizer | None,
    count: int | None,
    seq_len: int,
    config: LlamaConfig,
    *,
    held_out: int = 0,
    own: float = 0.0,
) -> CalibrationText:
    """Reads a calibration text, or several, no further than their windows reach.

    Args:
      text: its name or its tokens, or "own" for what the model is to write, by `write_own`; or several of these, each
        with its weight: how many windows come from it, against the others.
      tokenizer: of the model; not needed for tokens, or for what it writes.
      count: tokens to calibrate on; None for `CALIBRATION_TOKENS`, or what a single shorter text has.
      seq_len: tokens in a window.
      config: of the model.
      held_out: windows to hold out after those; of a shorter text, what is left of it, or where `count` is None an
        eighth of it. Of several texts, what the model writes is not held out: it is no measure beside text that is
        there.
      own: beside a single text, part of the windows that the model is to write, in [0, 1).

    Raises:
      HeadshareError: no such text or tokenizer, too short a text, a weight that is none, or windows that the model
        cannot write.
    """
    if seq_len < 2:
        raise HeadshareError(f"seq_len must be at least 2, not {seq_len}.")
    texts = weighted(text)
    if any(is_own(each) for each, _ in texts):
        check_window(config, seq_len)
    asked = CALIBRATION_TOKENS if count is None else count
    windows = asked // seq_len
    if windows < 1:
        raise HeadshareError(
            f"Calibration needs at least one window, and {asked} tokens are less than one of {seq_len}; give it more "
            "tokens, or shorter windows.",
            option=("calibrate_tokens", "seq_len"),
        )
    if len(texts) > 1:
        return _several(texts, tokenizer, windows, seq_len, config.vocab_size, held_out)
    least = 1 if count is None else windows
    part = _first_windows(texts[0][0], tokenizer, windows + held_out, seq_len, config.vocab_size, least)
    there = part.windows
    if count is None and there < windows + held_out:
        held_out = min(held_out, there // 8)
        windows = min(windows, max(there - held_out, 1))
    if is_own(texts[0][0]):
        own = 0.0
    kept = min(windows, asked // seq_len - int(own * (asked // seq_len)))
    part = replace(part, windows=kept, held_out=min(held_out, there - kept), weight=float(kept))
    written = int(kept * own / (1 - own) + 1e-9)
    return CalibrationText((part, TextPart(OWN_TEXT, written, weight=float(written))) if written else (part,))


def write_own(
    text: CalibrationText,
    source: WeightSource,
    seq_len: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationText:
    """A calibration text with what of it the model is to write, for which the model is in memory as a whole."""
    if not text.to_write:
        return text
    return text.written(own_text(to_decode(source), text.to_write, seq_len, progress=progress))


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
    shares = np.bincount(turns(weights, windows), minlength=len(texts)).tolist()
    others = [place for place, (text, _) in enumerate(texts) if not is_own(text)]
    order = np.asarray(others)[turns([weights[place] for place in others], held_out)]
    parts = []
    for place, (text, weight) in enumerate(texts):
        mine = np.flatnonzero(order == place)
        part = _first_windows(text, tokenizer, shares[place] + len(mine), seq_len, vocab_size)
        _check_share(part, weight, shares[place], windows, seq_len)
        left = part.windows - shares[place]
        if left < len(mine):
            order = order[: mine[left]]
        parts.append(replace(part, windows=shares[place], weight=weight))
    kept = np.bincount(order, minlength=len(texts)).tolist()
    return CalibrationText(tuple(replace(part, held_out=left) for part, left in zip(parts, kept, strict=True)))


def _check_share(part: TextPart, weight: float, share: int, windows: int, seq_len: int) -> None:
    """Raises HeadshareError unless a text has its share of the windows, and has any."""
    if not share or part.windows < share:
        raise HeadshareError(
            f"Of {windows} windows of {seq_len} tokens {share} are to come from {part.name} by its weight of "
            f"{weight:g}, which has {part.windows}; give a longer text, another weight, or another calibrate_tokens."
            if share
            else f"None of {windows} windows comes from {part.name} by its weight of {weight:g}; raise it, or "
            "calibrate_tokens.",
            option=("calibrate", "calibrate_tokens"),
        )


def _first_windows(
    text: Text, tokenizer: AnyTokenizer | None, count: int, seq_len: int, vocab_size: int, least: int = 0
) -> TextPart:
    """A text's first windows, at most so many; or as many as that for the model to write.

    Raises:
      HeadshareError: no such text or tokenizer, or it has fewer windows than the least.
    """
    if is_own(text):
        return TextPart(OWN_TEXT, count)
    tokens, name, digest = _beginning(text, tokenizer, count * seq_len)
    there = max(len(tokens) // seq_len, least)
    tokens_wt = calibration_windows(tokens, there, seq_len, vocab_size) if there else np.zeros((0, seq_len), np.int32)
    return TextPart(name, there, tokens_wt=tokens_wt, whole=digest)


def _is_text(value: object) -> "TypeIs[Text]":
    return storage.is_name(value) or isinstance(value, np.ndarray)


def _called(text: Text) -> str:
    return "token ids" if isinstance(text, np.ndarray) else str(text)


def _beginning(text: Text, tokenizer: AnyTokenizer | None, count: int) -> tuple[np.ndarray, str, str | None]:
    """A text's first tokens, at most so many, its name, and the digest of all of it if it is not tokens itself."""
    if isinstance(text, np.ndarray):
        return text.ravel()[:count], _called(text), None
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
