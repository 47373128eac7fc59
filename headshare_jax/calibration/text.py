"""The text that a method is calibrated on: of one, of several in turns, or what the model writes itself."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headshare_jax.calibration.overlap import Overlap, TextRuns
from headshare_jax.calibration.windows import tokens_digest, turns

# In place of a text's name; it is called `convert.card.OWN_TEXT` then.
OWN = "own"


@dataclass(frozen=True)
class TextPart:
    """What is taken of one text.

    Attributes:
      name: as it was given; `OWN_TEXT` for what the model writes.
      windows: to calibrate on, from the beginning of the text.
      held_out: windows after these, which no method sees; there may be none.
      weight: how much of it was asked for, against the other texts.
      tokens_wt: int32 [windows + held_out, T]; None while the model is still to write them.
      whole: digest of all of the text, where it was given by name.
    """

    name: str
    windows: int
    held_out: int = 0
    weight: float = 1.0
    tokens_wt: np.ndarray | None = None
    whole: str | None = None

    @property
    def windows_wt(self) -> np.ndarray:
        """int32 [W, T], what is calibrated on."""
        assert self.tokens_wt is not None
        return self.tokens_wt[: self.windows]

    @property
    def held_out_wt(self) -> np.ndarray:
        """int32 [W', T], what no method sees."""
        assert self.tokens_wt is not None
        return self.tokens_wt[self.windows : self.windows + self.held_out]

    @property
    def digest(self) -> str:
        """Of the whole text; of the windows, where these are all that is known of it."""
        return self.whole or tokens_digest(self.windows_wt)


@dataclass(frozen=True)
class CalibrationText:
    """The text that a method is calibrated on: one, or several whose windows take turns by their weights.

    Attributes:
      parts: what was taken of each; of one that the model writes there are tokens only in what `written` gives.
    """

    parts: tuple[TextPart, ...]

    @property
    def name(self) -> str:
        """The names as they were given."""
        return " and ".join(part.name for part in self.parts)

    @property
    def held_out_name(self) -> str:
        """The names of those of which something is held out."""
        return " and ".join(part.name for part in self.parts if part.held_out)

    @property
    def windows(self) -> int:
        """That are, or will be, calibrated on."""
        return sum(part.windows for part in self.parts)

    @property
    def held_out(self) -> int:
        """Windows that no method sees."""
        return sum(part.held_out for part in self.parts)

    @property
    def to_write(self) -> int:
        """Windows that the model is still to write."""
        return sum(part.windows + part.held_out for part in self.parts if part.tokens_wt is None)

    def written(self, windows_wt: np.ndarray) -> "CalibrationText":
        """The text with what the model wrote, int32 [to_write, T]."""
        parts = (replace(part, tokens_wt=windows_wt) if part.tokens_wt is None else part for part in self.parts)
        return CalibrationText(tuple(parts))

    @property
    def digest(self) -> str:
        """Of the whole text; of several, of their windows."""
        return self.parts[0].digest if len(self.parts) == 1 else tokens_digest(self.windows_wt)

    @property
    def windows_wt(self) -> np.ndarray:
        """int32 [W, T], what is calibrated on."""
        order = turns([part.weight for part in self.parts], self.windows)
        mixed_wt = np.concatenate([part.windows_wt for part in self.parts])
        for place, part in enumerate(self.parts):
            mixed_wt[order == place] = part.windows_wt
        return mixed_wt

    @property
    def held_out_wt(self) -> np.ndarray:
        """int32 [W', T], windows that no method sees, of one text after the other; there may be none."""
        return np.concatenate([part.held_out_wt for part in self.parts])

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
                {"name": part.name, "digest": part.digest, "weight": part.weight, "windows": part.windows}
                for part in self.parts
            ]
        }


def is_own(text: object) -> bool:
    """Whether a text's name stands for what the model is to write."""
    return isinstance(text, str) and text == OWN
