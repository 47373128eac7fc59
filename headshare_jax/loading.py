"""Models, tokenizers and texts by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import jax
import numpy as np
from jax.sharding import Mesh

from headshare_jax import convert
from headshare_jax.calibration.overlap import TextRuns
from headshare_jax.calibration.windows import calibration_windows, spread_windows, tokens_digest
from headshare_jax.convert import storage
from headshare_jax.convert import text as texts
from headshare_jax.convert import tokenizer as tokenizers
from headshare_jax.errors import HeadshareError
from headshare_jax.model.llama import Llama
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import cast
from headshare_jax.typed import typed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer, or the name of a model that carries one.
AnyTokenizer = Union[str, Path, "PreTrainedTokenizerBase"]
# Tokens that a method is calibrated on, unless others are asked for.
CALIBRATION_TOKENS = 49152
# Windows that models are measured on.
MEASURED_WINDOWS = 16
# A text by name, as for `convert.text.open_corpus`, or its token ids.
Text = str | Path | np.ndarray


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
class CalibrationText:
    """A text that a method is calibrated on.

    Attributes:
      name: as it was given.
      digest: of the whole text; of the windows, where it was given as tokens.
      windows_wt: int32 [W, T], its first windows.
      held_out_wt: int32 [W', T], the windows after them, which no method sees; there may be none.
    """

    name: str
    digest: str
    windows_wt: np.ndarray
    held_out_wt: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """What identifies the text and its windows, as plain data; `runs` tell whether another text was in them."""
        shape = list(self.windows_wt.shape)
        runs = TextRuns.of(self.windows_wt).to_json()
        return {"name": self.name, "digest": self.digest, "windows": shape, "runs": runs}


def calibration_text(
    text: Text,
    tokenizer: AnyTokenizer | None,
    count: int | None,
    seq_len: int,
    vocab_size: int,
    *,
    held_out: int = 0,
) -> CalibrationText:
    """Reads a calibration text, no further than its windows reach.

    Args:
      text: its name or its tokens.
      tokenizer: of the model; not needed for tokens.
      count: tokens to calibrate on; None for `CALIBRATION_TOKENS`, or what a shorter text has.
      seq_len: tokens in a window.
      vocab_size: V.
      held_out: windows to hold out after those; of a shorter text, what is left of it, or where `count` is None an
        eighth of it.

    Raises:
      HeadshareError: no such text or tokenizer, or too short a text.
    """
    if seq_len < 2:
        raise HeadshareError(f"seq_len must be at least 2, not {seq_len}.")
    wanted = CALIBRATION_TOKENS if count is None else count
    most = wanted + held_out * seq_len
    if isinstance(text, np.ndarray):
        tokens, name, digest = text[:most], "token ids", None
    else:
        corpus = texts.open_corpus(str(text))
        tokens, name, digest = _first_tokens(corpus, tokenizer_of(tokenizer), most), str(text), corpus.digest()
    windows, there = wanted // seq_len, len(tokens) // seq_len
    if count is None and there < windows + held_out:
        held_out = min(held_out, there // 8)
        windows = min(windows, max(there - held_out, 1))
    windows_wt = calibration_windows(tokens, windows, seq_len, vocab_size)
    rest = np.asarray(tokens[windows * seq_len :])
    held_out = min(held_out, len(rest) // seq_len)
    held_out_wt = (
        calibration_windows(rest, held_out, seq_len, vocab_size) if held_out else np.zeros((0, seq_len), np.int32)
    )
    return CalibrationText(name, digest or tokens_digest(windows_wt), windows_wt, held_out_wt)


def _first_tokens(corpus: texts.Corpus, tokenizer: "PreTrainedTokenizerBase", count: int) -> np.ndarray:
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
    return np.asarray(tokenizers.encode(tokenizer_of(tokenizer), texts.read(str(text), field=field)), np.int32)


def measured_windows(text: Text, tokenizer: AnyTokenizer | None, seq_len: int, vocab_size: int) -> np.ndarray:
    """Windows of a text to measure models on, int32 [W, T]; raises what `text_tokens` and `spread_windows` do."""
    return spread_windows(text_tokens(text, tokenizer), MEASURED_WINDOWS, seq_len, vocab_size)


def tokenizer_of(given: AnyTokenizer | None) -> "PreTrainedTokenizerBase":
    """A tokenizer, or that of a model by name; raises HeadshareError where none is given."""
    if given is None:
        raise HeadshareError("A text needs the tokenizer of the model; give it, or token ids.", option="tokenizer")
    return load_tokenizer(given) if storage.is_name(given) else given
