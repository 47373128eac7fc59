"""Journals of long work: what is finished of it, step by step, so that it can go on after a stop."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from headshare_jax.calibration.windows import tokens_digest
from headshare_jax.sharing.source import WeightSource, whole_fingerprint


class Journal(Protocol):
    """Finished steps of one piece of work, by name; each is arrays of float32, float16, bfloat16, int32 or uint8."""

    def read(self, step: str) -> dict[str, np.ndarray] | None:
        """What was written of a step, bit for bit; None if it is not finished."""

    def write(self, step: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps a finished step. Raises HeadshareError if it finds no room."""


class Journals(Protocol):
    """Journals of many pieces of work."""

    def of(self, work: str, key: Mapping[str, Any]) -> Journal:
        """The journal of a kind of work and of all that its result depends on, which is plain data.

        Raises:
          HeadshareError: it cannot be made.
        """


class NoJournal:
    """The journal of work that is not to go on after a stop."""

    def read(self, step: str) -> None:
        """No step is finished."""

    def write(self, step: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps nothing."""


def journal_of(
    journals: Journals | None,
    work: str,
    models: Mapping[str, WeightSource],
    windows_wt: np.ndarray,
    settings: Any,
    **more: Any,
) -> Journal:
    """The journal of a kind of work on some models and a text; without journals, one that keeps nothing."""
    if journals is None:
        return NoJournal()
    key = {name: whole_fingerprint(model) for name, model in models.items()}
    return journals.of(work, {**key, "text": tokens_digest(windows_wt), "settings": asdict(settings), **more})
