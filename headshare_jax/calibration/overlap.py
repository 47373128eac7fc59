"""How much of the text that a model is judged on was in the text that it was fitted to, also where the cuts differ."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

# Tokens of a run: in two texts that have nothing to do with each other, hardly any run is the same.
RUN = 32
# Runs of a text that are kept.
_KEPT = 2048
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """What of a text was in another one.

    Attributes:
      windows: of the text.
      seen: of them, those that were in the other text by half or more; estimated, where only a sample of that is kept.
      share: part of all runs of 32 tokens that were in the other text, in [0, 1].
      texts: where the other is several, the names of those that some of it was in.
    """

    windows: int
    seen: int
    share: float
    texts: tuple[str, ...] = ()

    def sentence(self, other: str = "the text that the model was fitted to") -> str:
        """What a reader has to know of it."""
        if self.texts:
            other = f"{other} ({' and '.join(self.texts)})"
        if not self.share:
            return f"None of the {self.windows} windows was in {other}."
        runs = f"{_percent(self.share)} of all runs of {RUN} tokens"
        return f"{self.seen} of {self.windows} windows ({runs}) were in {other}; on other text, figures are worse."


@dataclass(frozen=True)
class TextRuns:
    """The runs of 32 tokens of a text by their hashes: all, or of a longer text the 2,048 lowest.

    The same runs of another text have the same hashes, so that a sample of both is compared.

    Attributes:
      hashes: uint64, ascending, without repetition.
    """

    hashes: np.ndarray

    @classmethod
    def of(cls, *texts: np.ndarray) -> Self:
        """Of one text's token ids, int [...], or of several; windows count as one text in their order."""
        return cls(np.unique(np.concatenate([_hashes(np.ravel(tokens)) for tokens in texts]))[:_KEPT])

    @classmethod
    def from_json(cls, text: object) -> Self | None:
        """What `to_json` gave; None where it is anything else."""
        try:
            data = base64.b64decode(str(text), validate=True)
            return cls(np.frombuffer(data, "<u8").astype(np.uint64)) if data else None
        except (binascii.Error, ValueError):
            return None

    @classmethod
    def in_provenance(cls, provenance: Mapping[str, Any]) -> Self | None:
        """Of the text that a model was calibrated on, if its provenance tells."""
        match provenance:
            case {"calibration": {"runs": runs}}:
                return cls.from_json(runs)
        return None

    def to_json(self) -> str:
        """As plain data: base64 of the hashes, each in 8 bytes, little-endian."""
        return base64.b64encode(self.hashes.astype("<u8").tobytes()).decode()

    def overlap(self, tokens: np.ndarray, seq_len: int, max_windows: int | None = None) -> Overlap:
        """What of a text, int [tokens], that is cut into windows without overlap was in this one.

        Args:
          tokens: of the text; what is left after the last whole window does not count.
          seq_len: tokens in a window; a shorter text is one window.
          max_windows: count the first windows only.
        """
        tokens = np.asarray(tokens)
        seq_len = min(seq_len, tokens.size)
        windows = tokens.size // seq_len if seq_len else 0
        windows = windows if max_windows is None else min(windows, max_windows)
        hashes = _hashes(tokens[: windows * seq_len])
        # Where the sample ends; beyond it nothing is known.
        known = hashes <= self.hashes[-1] if len(self.hashes) == _KEPT else np.ones(len(hashes), bool)
        found = known & np.isin(hashes, self.hashes)
        window = np.arange(len(hashes)) // max(seq_len, 1)
        known_w, found_w = (np.bincount(window[each], minlength=windows) for each in (known, found))
        seen = np.count_nonzero((known_w > 0) & (2 * found_w >= known_w)) / (np.count_nonzero(known_w) or 1)
        share = np.count_nonzero(found) / (np.count_nonzero(known) or 1)
        return Overlap(windows, round(windows * seen), share)


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """A hash of the run that begins at each token, uint64 [tokens - RUN + 1]."""
    if tokens.size < RUN:
        return np.zeros(0, np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), RUN)
    with np.errstate(over="ignore"):
        mixed = np.zeros(len(runs), np.uint64)
        for place in range(RUN):
            mixed = (mixed ^ runs[:, place]) * _MULTIPLIER
            mixed ^= mixed >> np.uint64(29)
    return mixed


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1f} %"
