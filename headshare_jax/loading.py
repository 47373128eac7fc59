"""Models, tokenizers and texts by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from headshare_jax import convert
from headshare_jax.calibration.overlap import TextRuns
from headshare_jax.calibration.windows import calibration_windows, tokens_digest
from headshare_jax.convert import text as texts
from headshare_jax.convert import tokenizer as tokenizers
from headshare_jax.errors import HeadshareError
from headshare_jax.model.llama import Llama
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer, or the name of a model that carries one.
AnyTokenizer = Union[str, Path, "PreTrainedTokenizerBase"]
# A text by name, as for `convert.text.open_corpus`, or its token ids.
Text = str | Path | np.ndarray


def load(
    src: str | Path | WeightSource, *, dtype: str | None = None, compute_dtype: str = "float32", remat: str = "none"
) -> Llama:
    """Loads a model; peak memory is its own size plus one parameter.

    Args:
      src: native or Hugging Face folder, GGUF file, hub id, or an opened checkpoint.
      dtype: type to store parameters in (`float32`, `bfloat16`, `float16`); by default the checkpoint's own.
      compute_dtype: `float32` or `bfloat16`.
      remat: as in `Llama`.

    Raises:
      HeadshareError: as `open_checkpoint`, or a type that is none of these.

    Examples:
      >>> model = hs.load("my-llama")
      >>> model.config.num_layers, model.config.num_heads
      (3, 4)
    """
    source = convert.open_checkpoint(src) if isinstance(src, (str, Path)) else src
    return Llama.of(cast(source, dtype), compute_dtype=compute_dtype, remat=remat)


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
    return tokenizers.load(convert.locate(src))


@dataclass(frozen=True)
class CalibrationText:
    """A text that a method is calibrated on.

    Attributes:
      name: as it was given.
      digest: of the whole text; of the windows, where it was given as tokens.
      windows_wt: int32 [W, T], its first windows.
    """

    name: str
    digest: str
    windows_wt: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """What identifies the text and its windows, as plain data; `runs` tell whether another text was in them."""
        shape = list(self.windows_wt.shape)
        runs = TextRuns.of(self.windows_wt).to_json()
        return {"name": self.name, "digest": self.digest, "windows": shape, "runs": runs}


def calibration_text(
    text: Text, tokenizer: AnyTokenizer | None, count: int, seq_len: int, vocab_size: int
) -> CalibrationText:
    """Reads a calibration text, no further than its windows reach.

    Args:
      text: its name or its tokens.
      tokenizer: of the model; not needed for tokens.
      count, seq_len: tokens in all, and in a window.
      vocab_size: V.

    Raises:
      HeadshareError: no such text or tokenizer, or too short a text.
    """
    if seq_len < 2:
        raise HeadshareError(f"seq_len must be at least 2, not {seq_len}.")
    if isinstance(text, np.ndarray):
        windows_wt = calibration_windows(text, count // seq_len, seq_len, vocab_size)
        return CalibrationText("token ids", tokens_digest(windows_wt), windows_wt)
    loaded, corpus = tokenizer_of(tokenizer), texts.open_corpus(str(text))
    tokens: list[int] = []
    for piece in corpus.pieces():
        tokens += tokenizers.encode(loaded, piece.text)
        if len(tokens) >= count:
            break
    return CalibrationText(
        str(text), corpus.digest(), calibration_windows(tokens, count // seq_len, seq_len, vocab_size)
    )


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


def tokenizer_of(given: AnyTokenizer | None) -> "PreTrainedTokenizerBase":
    """A tokenizer, or that of a model by name; raises HeadshareError where none is given."""
    if given is None:
        raise HeadshareError("A text needs the tokenizer of the model; give it, or token ids.", option="tokenizer")
    return load_tokenizer(given) if isinstance(given, (str, Path)) else given
