"""Signals that ask for a stop: Ctrl-C, and SIGTERM, which machines send that are to be taken away."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import numpy as np

logger = logging.getLogger(__name__)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> Iterator[None]:
    """Gives both signals to a handler meanwhile, but not one that is ignored, as Ctrl-C is in a shell's background."""
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class Stop:
    """Whether any process was told to stop after what it is doing; `note` is the handler that hears of it.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self._told: list[int] = []

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return bool(self._told)
        from jax.experimental.multihost_utils import process_allgather

        return bool(process_allgather(np.int32(len(self._told))).any())

    @property
    def interrupted(self) -> bool:
        """Whether this process was told by Ctrl-C."""
        return signal.SIGINT in self._told

    def note(self, number: int, frame: FrameType | None) -> None:
        """Takes note of a signal."""
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            logger.warning("Stopping after this step, with a checkpoint; Ctrl-C again stops at once, without.")
        self._told.append(number)
