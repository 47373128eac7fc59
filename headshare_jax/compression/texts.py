"""The texts of a compression: what a method is calibrated on, and what both models are measured on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from headshare_jax.calibration.overlap import Overlap
from headshare_jax.calibration.own_text import check_window, own_text
from headshare_jax.calibration.windows import tokens_digest
from headshare_jax.config import LlamaConfig
from headshare_jax.convert import storage
from headshare_jax.errors import HeadshareError
from headshare_jax.loading import (
    CALIBRATION_TOKENS,
    MEASURED_WINDOWS,
    AnyTokenizer,
    CalibrationText,
    Text,
    TextPart,
    Texts,
    calibration_text,
    measured_windows,
    to_decode,
    weighted,
)
from headshare_jax.sharing.source import WeightSource

# In place of a text's name, and what the text is called then.
OWN, OWN_TEXT = "own", "text that the model wrote"
_NO_TEXT = "not measured, for there is no text; name one to measure on"
_NO_TEXT_LEFT = "not measured, for all of the text was fitted to; name another to measure on"


@dataclass(frozen=True)
class ReadTexts:
    """Windows of text, or how many of them the model is still to write.

    Attributes:
      seq_len: tokens in a window.
      calibration: what is calibrated on, with what it leaves to measure on.
      measured_wt: int32 [W, T], what is measured on; None if nothing is.
      measured_on: what that is called, or why there is none.
      own: windows that the model is to write.
      own_calibration: how many of them are to be calibrated on; the others are to be measured on.
    """

    seq_len: int
    calibration: CalibrationText | None
    measured_wt: np.ndarray | None
    measured_on: str
    own: int = 0
    own_calibration: int = 0

    @property
    def windows_wt(self) -> np.ndarray | None:
        """The windows to calibrate on, int32 [W, T]."""
        return None if self.calibration is None else self.calibration.windows_wt

    @property
    def calibrated(self) -> int:
        """Windows that are, or will be, calibrated on."""
        return self.own_calibration if self.calibration is None else len(self.calibration.windows_wt)

    @property
    def measured(self) -> int:
        """Windows that are, or will be, measured on."""
        return self.own - self.own_calibration + (0 if self.measured_wt is None else len(self.measured_wt))

    @property
    def overlap(self) -> Overlap | None:
        """What of the text that is measured on is calibrated on too."""
        if self.calibration is None or self.measured_wt is None:
            return None
        return self.calibration.overlap(self.measured_wt.ravel(), self.seq_len)

    def with_own(self, source: WeightSource, progress: Callable[[int, int], None]) -> "ReadTexts":
        """The texts with what the model now writes, for which it is in memory as a whole."""
        windows_wt = own_text(to_decode(source), self.own, self.seq_len, progress=progress)
        fitted_wt, left_wt = windows_wt[: self.own_calibration], windows_wt[self.own_calibration :]
        texts = replace(self, own=0, own_calibration=0)
        if len(fitted_wt):
            part = TextPart(OWN_TEXT, tokens_digest(fitted_wt), fitted_wt, left_wt)
            texts = replace(texts, calibration=CalibrationText((part,)))
        return replace(texts, measured_wt=left_wt, measured_on=OWN_TEXT) if len(left_wt) else texts


def check_calibration(calibrate: Texts) -> None:
    """Raises HeadshareError unless it is a text, or several with weights, of which the model writes none."""
    texts = weighted(calibrate)
    if len(texts) > 1 and any(isinstance(text, str) and text == OWN for text, _ in texts):
        raise HeadshareError(
            f'"{OWN}" stands for text that the model writes, which is not mixed with others; give it alone, or not.',
            option="calibrate",
        )


def read(
    calibrate: Texts | None,
    evaluate: Text | bool,
    tokenizer: AnyTokenizer | None,
    config: LlamaConfig,
    *,
    count: int | None,
    seq_len: int,
) -> ReadTexts:
    """Reads the texts that are given, and says what the model is to write.

    Args:
      calibrate: what to calibrate on, if anything is given; "own" for what the model is to write.
      evaluate: a text to measure on; True for what is left of the other, or more of the model's own; False for none.
      tokenizer: of the model.
      config: of the model.
      count: tokens to calibrate on, as for `calibration_text`.
      seq_len: tokens in a window.

    Raises:
      HeadshareError: no such text, too short a text, or windows that the model cannot write.
    """
    calibration, measured_wt, measured_on = None, None, "not measured" if evaluate is False else _NO_TEXT
    own_calibration = own_measured = 0
    if isinstance(calibrate, str) and calibrate == OWN:
        check_window(config, seq_len)
        own_calibration = max(1, (CALIBRATION_TOKENS if count is None else count) // seq_len)
        own_measured = MEASURED_WINDOWS if evaluate is True else 0
    elif calibrate is not None:
        held_out = MEASURED_WINDOWS if evaluate is True else 0
        calibration = calibration_text(calibrate, tokenizer, count, seq_len, config.vocab_size, held_out=held_out)
    if storage.is_name(evaluate) or isinstance(evaluate, np.ndarray):
        measured_wt = measured_windows(evaluate, tokenizer, seq_len, config.vocab_size)
        measured_on = "token ids" if isinstance(evaluate, np.ndarray) else str(evaluate)
    elif evaluate and calibration is not None:
        measured_on = _NO_TEXT_LEFT
        if len(calibration.held_out_wt):
            measured_wt, measured_on = calibration.held_out_wt, f"what was not fitted to of {calibration.name}"
    return ReadTexts(seq_len, calibration, measured_wt, measured_on, own_calibration + own_measured, own_calibration)
