"""How a run is told to stop: after the same step in all processes, whichever heard of it."""

import logging
import signal
from types import FrameType

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from headshare_jax.processes.agreement import give_notice

logger = logging.getLogger(__name__)


class Stop:
    """Whether any process was told to stop after what it is doing; `note` is the handler that hears of it.

    A second signal raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self._told: list[int] = []
        self._published = False

    def __call__(self, step: int) -> bool:
        """Whether to stop after a step; every process asks after each, and all hear the same."""
        if jax.process_count() == 1:
            return bool(self._told)
        if self._told and not self._published:
            give_notice()
            self._published = True
        return reached_preemption_sync_point(step)

    @property
    def interrupted(self) -> bool:
        """Whether this process was told by Ctrl-C."""
        return signal.SIGINT in self._told

    def note(self, number: int, frame: FrameType | None) -> None:
        """Takes note of a signal."""
        if self._told:
            raise KeyboardInterrupt(number)
        if number == signal.SIGINT:
            logger.warning("Stopping after this step, with a checkpoint; Ctrl-C again stops at once, without.")
        self._told.append(number)
