"""What the commands that share have in common: the options of a method, and the text it is calibrated on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from headshare_jax import convert
from headshare_jax.calibration import calibration_windows
from headshare_jax.convert import text, tokenizer
from headshare_jax.errors import HeadshareError

Calibrate = Annotated[
    str | None,
    tyro.conf.arg(
        help="Text to choose donors and fit on: text, JSONL or parquet file, or data set name[:config[:split]]; of its "
        "train split."
    ),
]
CalibrateTokens = Annotated[int, tyro.conf.arg(help="Tokens of that text to use, from its start.")]
SeqLen = Annotated[int, tyro.conf.arg(help="Tokens in a window of text.")]
MatchFunction = Annotated[
    str | None,
    tyro.conf.arg(
        help="Score of a pair for methods that compare weights: cosine of q, k, v, qk (by default), qkv or total "
        "weights; or random."
    ),
]
Tie = Annotated[str, tyro.conf.arg(help="Projections to share: some of q, k, v, o, in that order.")]
Chains = Annotated[
    str | None,
    tyro.conf.arg(
        help="resolve (by default): a donor that receives is replaced by its root; forbid (fitted): no donor receives."
    ),
]


@dataclass(frozen=True)
class CalibrationText:
    """A text that a method is calibrated on.

    Attributes:
      name: as it was given.
      digest: of the whole text.
      windows_wt: int32 [W, T], its first windows.
    """

    name: str
    digest: str
    windows_wt: np.ndarray


def calibration_text(path: Path, source: convert.Checkpoint, name: str, count: int, seq_len: int) -> CalibrationText:
    """Reads a calibration text, no further than its windows reach.

    Args:
      path: where the tokenizer is.
      source: the model.
      name: the text, as for `text.open_corpus`.
      count, seq_len: tokens in all, and in a window.

    Raises:
      HeadshareError: no such text, or too short a one.
    """
    if seq_len < 2:
        raise HeadshareError(f"seq_len must be at least 2, not {seq_len}.")
    words, corpus = tokenizer.load(path), text.open_corpus(name)
    tokens: list[int] = []
    for piece in corpus.pieces():
        tokens += words(piece.text, verbose=False).input_ids
        if len(tokens) >= count:
            break
    windows_wt = calibration_windows(tokens, count // seq_len, seq_len, source.config.vocab_size)
    return CalibrationText(name, corpus.digest(), windows_wt)
