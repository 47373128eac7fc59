"""Signals that ask for a stop: Ctrl-C, and SIGTERM, which machines send that are to be taken away."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import numpy as np

logger = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], Any]


STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handled(handler: Handler | signal.Handlers, numbers: tuple[signal.Signals, ...] = STOPS) -> Iterator[None]:
    """Gives both signals to a handler meanwhile, but not one that is ignored, as Ctrl-C is in a shell's background."""
    before = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number, former in before.items() if former is not signal.SIG_IGN]
    try:
        for number in heard:
            signal.signal(number, _Deferrable(handler) if callable(handler) else handler)
        yield
    finally:
        with deferred():
            for number in heard:
                signal.signal(number, before[number])


@contextmanager
def deferred() -> Iterator[None]:
    """Holds a stop back to the end of the block, which does what must not be left half done, such as tidying up.

    It holds back a handler that `handled` has set, and Python's own for Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler ever runs
        yield
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with handled(signal.default_int_handler, (signal.SIGINT,)), deferred():
            yield
        return
    _Deferrable.depth += 1
    try:
        yield
    finally:
        _Deferrable.depth -= 1
        if not _Deferrable.depth and _Deferrable.waiting:
            first, *_ = _Deferrable.waiting
            _Deferrable.waiting.clear()
            first()


class _Deferrable:
    """A handler that waits for the end of `deferred` blocks."""

    depth = 0
    waiting: list[Callable[[], Any]] = []  # noqa: RUF012 (one for all)

    def __init__(self, handler: Handler):
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.depth:
            self.waiting.append(lambda: self.handler(number, frame))
        else:
            self.handler(number, frame)


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
