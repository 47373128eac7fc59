"""Windows of calibration text."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from headshare_jax.errors import HeadshareError
from headshare_jax.typed import typed


@typed
def calibration_windows(tokens: Sequence[int] | np.ndarray, count: int, seq_len: int, vocab_size: int) -> np.ndarray:
    """The text's first windows, int32 [count, seq_len].

    Args:
      tokens: the text as one sequence of token ids.
      count: windows.
      seq_len: tokens in each.
      vocab_size: V.

    Raises:
      HeadshareError: the text is too short, a token is outside the vocabulary, or the windows have no tokens.

    Examples:
      >>> hs.calibration_windows(tokens, count=12, seq_len=64, vocab_size=model.config.vocab_size).shape
      (12, 64)
    """
    tokens = np.asarray(tokens)
    if count < 1 or seq_len < 2:
        raise HeadshareError(
            f"Calibration needs at least one window of two tokens, not {count} of {seq_len}; give it more tokens."
        )
    if tokens.size < count * seq_len:
        raise HeadshareError(
            f"The calibration text has {tokens.size} tokens, but {count} windows of {seq_len} need {count * seq_len}; "
            "give a longer text, or ask for fewer tokens."
        )
    windows = tokens[: count * seq_len].reshape(count, seq_len)
    if windows.dtype.kind not in "iu" or windows.min() < 0 or windows.max() >= vocab_size:
        raise HeadshareError(f"The calibration text holds a token outside the model's vocabulary of {vocab_size}.")
    return windows.astype(np.int32)


def spread_windows(tokens: Sequence[int] | np.ndarray, most: int, seq_len: int, vocab_size: int) -> np.ndarray:
    """At most so many windows from all over a text, evenly spread, int32 [W, seq_len]; a shorter text is one window.

    Raises:
      HeadshareError: fewer than two tokens, or one outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    seq_len = min(seq_len, tokens.size)
    there = calibration_windows(tokens, max(1, tokens.size // max(seq_len, 1)), seq_len, vocab_size)
    return there[np.linspace(0, len(there) - 1, min(most, len(there))).astype(int)]


def turns(weights: Sequence[float], count: int) -> np.ndarray:
    """Which of several texts each window is of, int64 [count]: in turns, each as often as its weight says.

    Of the first windows, however many, each text has its part, rounded up or down.
    """
    taken, part = np.zeros(len(weights)), np.asarray(weights) / np.sum(weights)
    order = np.empty(count, np.int64)
    for place in range(count):
        # Of those whose part is not there yet, the one that is due first.
        due = np.where(taken < part * (place + 1), (taken + 1) / part, np.inf)
        order[place] = np.argmin(due)
        taken[order[place]] += 1
    return order


def tokens_digest(tokens: np.ndarray) -> str:
    """SHA-256 of token ids, int32 [...], as a model reads them: of how they are cut, too."""
    return f"sha256:{hashlib.sha256(json.dumps(tokens.shape).encode() + tokens.tobytes()).hexdigest()}"
