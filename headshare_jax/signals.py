"""Signals that ask for a stop: Ctrl-C, and SIGTERM, which machines send that are to be taken away."""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

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


@contextmanager
def insistent(seconds: float = 10.0) -> Iterator[None]:
    """Sees to it that a second signal ends the process: so many seconds later, if it has not ended by itself.

    Python's own handlers do not run as long as the main thread waits in a library, as for a process that never comes.
    """
    if threading.current_thread() is not threading.main_thread():  # where no signal is heard
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second, args=(reading, seconds), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def _end_at_second(reading: int, seconds: float) -> None:
    """Reads the numbers of the signals that come, until the other end is closed."""
    came, until = 0, None
    with open(reading, "rb", buffering=0) as signals:
        while select.select([signals], [], [], None if until is None else max(0.0, until - time.monotonic()))[0]:
            number = signals.read(1)
            if not number:
                return
            came += number[0] in STOPS
            if came == 2 and until is None:
                last, until = number[0], time.monotonic() + seconds
    os.write(2, b"headshare: stopped at the second signal, without a checkpoint.\n")
    os._exit(128 + last)
