"""How a run is told to stop: after the same step in all processes, whichever heard of it."""

import logging
import signal
from types import FrameType

import jax

from headshare_jax.processes.agreement import said, say_first, unique

logger = logging.getLogger(__name__)

# When one process asks about a step, each other one has asked about the step two before: it has begun the step between,
# whose sums wait for all. So what one says as it asks, all know when they ask about the step two later.
_STEPS_AHEAD = 2


class Stop:
    """Whether any process was told to stop after what it is doing; `note` is the handler that hears of it.

    A second signal raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self._told: list[int] = []
        # Of several processes: by what they agree, and the step to stop after, as text.
        self._key: str | None = None
        self._last: str | None = None

    def __call__(self, step: int) -> bool:
        """Whether to stop after a step; every process asks once about each, in order, and all hear the same."""
        if jax.process_count() == 1:
            return bool(self._told)
        if self._key is None:
            self._key = unique("stop")
        if self._last is None:
            self._last = say_first(self._key, str(step + _STEPS_AHEAD)) if self._told else said(self._key)
        return self._last is not None and step >= int(self._last)

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
