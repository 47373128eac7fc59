"""What the commands that share have in common: the options of a method, and the text it is calibrated on."""

from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from headshare_jax import convert
from headshare_jax.calibration import calibration_windows
from headshare_jax.cli.command import progress
from headshare_jax.convert import text, tokenizer
from headshare_jax.errors import HeadshareError
from headshare_jax.methods import Method, MethodSettings
from headshare_jax.similarity import MatchResult

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


def read_windows(path: Path, source: convert.Checkpoint, spec: str, count: int, seq_len: int) -> np.ndarray:
    """The windows of a calibration text, int32 [W, T], read no further than they reach.

    Args:
      path: where the tokenizer is.
      source: the model.
      spec: the text, as for `text.open_corpus`.
      count, seq_len: tokens in all, and in a window.

    Raises:
      HeadshareError: no such text, or too short a one.
    """
    if seq_len < 2:
        raise HeadshareError(f"seq_len must be at least 2, not {seq_len}.")
    words = tokenizer.load(path)
    tokens: list[int] = []
    for piece in text.open_corpus(spec).pieces():
        tokens += words(piece.text, verbose=False).input_ids
        if len(tokens) >= count:
            break
    return calibration_windows(tokens, count // seq_len, seq_len, source.config.vocab_size)


def scored(
    method: Method, source: convert.Checkpoint, windows_wt: np.ndarray | None, settings: MethodSettings
) -> MatchResult:
    """A method's scores, with a progress bar."""
    with progress("matching") as step:
        return method.scores(source, windows_wt, settings, step)
