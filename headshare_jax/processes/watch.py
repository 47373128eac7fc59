"""Every process watches over the others: when one is gone, the rest say so in one sentence and end.

Nothing wakes a process that hangs in a collective with one that is gone. So a thread of each sends a sign of life every
few seconds over the connection that they met by: the first process hears all others, and they hear the first.
"""

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from headshare_jax.errors import TRY_AGAIN, HeadshareError

BEAT_SECONDS = 2.0
# How long the others may still end by themselves when one has said why it ends.
_GRACE_SECONDS = 10.0
_LONGEST = 400

Remedy = Callable[[], str]


def silence_seconds() -> float:
    """Seconds without a sign of life after which a process counts as gone: `$HEADSHARE_SILENCE_SECONDS`, or 40."""
    said = os.environ.get("HEADSHARE_SILENCE_SECONDS") or "40"
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not seconds > 2 * BEAT_SECONDS:
        raise HeadshareError(
            f"HEADSHARE_SILENCE_SECONDS must be a number above {2 * BEAT_SECONDS:.0f}, not {said:.50}."
        )
    return seconds


class Watch:
    """The thread of a process that watches over others, and ends the process with code 75 where one is gone.

    Attributes:
      remedy: gives what to do then, as it ends a sentence; it must not wait for anything.
    """

    def __init__(self, me: int, peers: dict[int, socket.socket], silence: float):
        self.me, self.silence = me, silence
        self.remedy: Remedy = lambda: "start all processes again"
        self._peers = peers
        self._heard = dict.fromkeys(peers, time.monotonic())
        self._unread = dict.fromkeys(peers, b"")
        # Why others end, by their numbers, and when this process ends too if it has not by itself.
        self._ending: tuple[str, float] | None = None
        self._over = threading.Event()
        # Whoever has it has the last word.
        self._word = threading.Lock()
        self._selector = selectors.DefaultSelector()
        for number, connection in peers.items():
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, number)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def leave(self, why: str | None = None) -> None:
        """Watches no longer, since the run is over, or since this process ends for a reason that the others are told.

        It does not return if another process is found gone in this moment: this process ends then.
        """
        self._word.acquire()
        self._over.set()
        self._tell({"over": True} if why is None else {"ends": self.me, "why": why[:_LONGEST]})

    def wait(self, seconds: float) -> None:
        """Gives it so many seconds to find that another process is gone, and to end this one."""
        self._over.wait(seconds)

    def _run(self) -> None:
        beat = 0.0
        while not self._over.is_set():
            for key, _ in self._selector.select(BEAT_SECONDS / 4):
                self._receive(key.data)
            now = time.monotonic()
            if now - beat >= BEAT_SECONDS:
                self._tell({"beat": True})
                beat = now
            for number, heard in list(self._heard.items()):
                if now - heard > self.silence:
                    self._gone(number)
            if self._ending is not None and now > self._ending[1]:
                self._end(self._ending[0])

    def _receive(self, number: int) -> None:
        try:
            data = self._peers[number].recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget(number)
            if self._ending is None:
                self._gone(number)
            return
        self._heard[number] = time.monotonic()
        *lines, self._unread[number] = (self._unread[number] + data).split(b"\n")
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                self._take(number, json.loads(line))

    def _take(self, number: int, message: dict[str, Any]) -> None:
        if "gone" in message:
            self._gone(int(message["gone"]))
        elif "ends" in message:
            self._tell(message, but=number)
            self._ends(int(message["ends"]), str(message["why"]))
        elif "over" in message:
            self._forget(number)

    def _forget(self, number: int) -> None:
        self._selector.unregister(self._peers[number])
        self._heard.pop(number, None)

    def _ends(self, number: int, why: str) -> None:
        self._heard.pop(number, None)
        if self._ending is None:
            said = f"{_name(number)} stopped ({why.rstrip('.')})"
            self._ending = said, time.monotonic() + _GRACE_SECONDS

    def _gone(self, number: int) -> None:
        self._tell({"gone": number}, but=number)
        self._end(f"{_name(number)} is gone")

    def _end(self, what: str) -> None:
        self._word.acquire()
        with suppress(OSError):
            line = "\n" if os.isatty(2) else ""
            os.write(2, f"{line}headshare: {what}; {self.remedy()}.\n".encode())
        os._exit(TRY_AGAIN)

    def _tell(self, message: dict[str, Any], but: int | None = None) -> None:
        data = json.dumps(message).encode() + b"\n"
        for number, connection in self._peers.items():
            if number != but:
                # One that takes nothing more has been silent for long.
                with suppress(OSError):
                    connection.send(data)


def _name(number: int) -> str:
    return f"Process {number}" if number else "The first process"
