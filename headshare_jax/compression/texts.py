"""The texts of a compression: what a method is calibrated on, and what both models are measured on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from headshare_jax.calibration.overlap import Overlap
from headshare_jax.calibration.text import CalibrationText
from headshare_jax.config import LlamaConfig
from headshare_jax.convert import storage
from headshare_jax.loading import (
    MEASURED_WINDOWS,
    AnyTokenizer,
    Text,
    Texts,
    calibration_text,
    measured_windows,
    write_own,
)
from headshare_jax.sharing.source import WeightSource

_NO_TEXT = "not measured, for there is no text; name one to measure on"
_NO_TEXT_LEFT = "not measured, for all of the text was fitted to; name another to measure on"


@dataclass(frozen=True)
class ReadTexts:
    """Windows of text, some of which the model may be still to write.

    Attributes:
      seq_len: tokens in a window.
      calibration: what is calibrated on, with what it leaves to measure on.
      other_wt: int32 [W, T], another text to measure on; None if what is left is measured on, or nothing.
      measured_on: what is measured on, or why nothing is.
    """

    seq_len: int
    calibration: CalibrationText | None
    other_wt: np.ndarray | None
    measured_on: str

    @property
    def windows_wt(self) -> np.ndarray | None:
        """The windows to calibrate on, int32 [W, T]."""
        return None if self.calibration is None else self.calibration.windows_wt

    @property
    def measured_wt(self) -> np.ndarray | None:
        """The windows to measure on, int32 [W, T]; None if there are none."""
        if self.other_wt is not None or self.calibration is None or not self.calibration.held_out:
            return self.other_wt
        return self.calibration.held_out_wt

    @property
    def calibrated(self) -> int:
        """Windows that are, or will be, calibrated on."""
        return 0 if self.calibration is None else self.calibration.windows

    @property
    def measured(self) -> int:
        """Windows that are, or will be, measured on."""
        if self.other_wt is not None:
            return len(self.other_wt)
        return 0 if self.calibration is None else self.calibration.held_out

    @property
    def own(self) -> int:
        """Windows that the model is still to write."""
        return 0 if self.calibration is None else self.calibration.to_write

    @property
    def overlap(self) -> Overlap | None:
        """What of the text that is measured on is calibrated on too."""
        if self.calibration is None or self.measured_wt is None:
            return None
        return self.calibration.overlap(self.measured_wt.ravel(), self.seq_len)

    def with_own(self, source: WeightSource, progress: Callable[[int, int], None]) -> "ReadTexts":
        """The texts with what the model now writes; see `write_own`."""
        assert self.calibration is not None
        return replace(self, calibration=write_own(self.calibration, source, self.seq_len, progress))


def read(
    calibrate: Texts | None,
    evaluate: Text | bool,
    tokenizer: AnyTokenizer | None,
    config: LlamaConfig,
    *,
    count: int | None,
    seq_len: int,
    own: float,
) -> ReadTexts:
    """Reads the texts that are given, and says what the model is to write.

    Args:
      calibrate: what to calibrate on, if anything is given, as for `calibration_text`.
      evaluate: a text to measure on; True for what is held out of the other; False for none.
      tokenizer: of the model.
      config: of the model.
      count: tokens to calibrate on, as for `calibration_text`.
      seq_len: tokens in a window.
      own: as for `calibration_text`.

    Raises:
      HeadshareError: no such text, too short a text, or windows that the model cannot write.
    """
    calibration, other_wt, measured_on = None, None, "not measured" if evaluate is False else _NO_TEXT
    if calibrate is not None:
        held_out = MEASURED_WINDOWS if evaluate is True else 0
        calibration = calibration_text(calibrate, tokenizer, count, seq_len, config, held_out=held_out, own=own)
    if storage.is_name(evaluate) or isinstance(evaluate, np.ndarray):
        other_wt = measured_windows(evaluate, tokenizer, seq_len, config.vocab_size)
        measured_on = "token ids" if isinstance(evaluate, np.ndarray) else str(evaluate)
    elif evaluate and calibration is not None:
        left = calibration.held_out_name
        measured_on = f"what was not fitted to of {left}" if left else _NO_TEXT_LEFT
    return ReadTexts(seq_len, calibration, other_wt, measured_on)
