"""Objects in a bucket that tell which process is at work there, renewed while it runs.

Buckets have no locks that end with a process. A lease is taken by a conditional write, which of several processes one
alone succeeds in, and is written again twice a minute. One that was not written for two minutes, by the storage's own
clock, is of a process that was killed, or whose machine was taken away: whoever comes next takes it over.
"""

import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from headshare_jax.convert import storage
from headshare_jax.errors import TRY_AGAIN, HeadshareError, TryAgain

logger = logging.getLogger(__name__)

# Seconds after which a lease is void that was not renewed, and between renewals.
SECONDS, RENEWED = 120.0, 30.0


def me() -> dict[str, Any]:
    """This process, as a lock names it."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "since": time.strftime("%F %T %z"),
        "lease_seconds": SECONDS,
        # So that a process knows its own, whatever its name and number were before.
        "token": secrets.token_hex(8),
    }


def runs(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        # One that was killed stays a zombie until its parent asks for it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return True


class Renewal:
    """Calls a function twice a minute, in a thread, until it is ended."""

    def __init__(self, renew: Callable[[], None]):
        self._renew, self._ended = renew, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="lease")
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(RENEWED):
            with suppress(OSError, HeadshareError):
                self._renew()

    def end(self, *, wait: bool = True) -> None:
        """Returns when no call goes on any more, unless that is not to be waited for."""
        self._ended.set()
        if wait:
            self._thread.join()


class Lease:
    """A lease that this process has.

    Attributes:
      path: the object.
      found: what its last holder, which was killed, had told; None if nobody had it. It goes on to be told until
        `tell` says otherwise, in case that this process is killed too.

    Raises:
      TryAgain: another process has it.
      HeadshareError: the bucket forbids it, or is not there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] | None = None
        self._about = me()
        self._said: dict[str, Any] = {}
        self._writing, self._left = threading.Lock(), False
        self._generation = self._written(None) or self._taken_over()
        self._renewal = Renewal(self._renew)

    def _taken_over(self) -> str:
        expected, found = storage.generation(self.path), read(self.path)
        if found is not None and found.get("token") != self._about["token"]:
            check_free(self.path, found)
            self.found, self._said = found, {name: said for name, said in found.items() if name not in self._about}
        if generation := self._written(expected):
            return generation
        raise TryAgain(f"Another process has just begun to work in {self.path.parent}; wait until it has ended.")

    def _written(self, expected: str | None) -> str | None:
        return storage.write_if(self.path, json.dumps(self._told()).encode(), expected)

    def _told(self) -> dict[str, Any]:
        return {**self._said, **self._about}

    def tell(self, **said: Any) -> None:
        """Tells this in it, for whoever takes it over."""
        self._said = said
        self._renew()

    def _renew(self) -> None:
        with self._writing:
            try:
                written = self._written(self._generation)
            except (HeadshareError, OSError) as error:
                logger.info("The lease %s could not be renewed: %s", self.path, error)
                return
            if written is None and (read(self.path) or {}).get("token") != self._about["token"]:
                self._lost()
            self._generation = written or storage.generation(self.path) or ""

    def _lost(self) -> None:
        """Ends the process at once: what it would still write would get among what another one writes."""
        print(
            f"headshare: this process was stopped or cut off for so long that another one has taken {self.path} over; "
            "it ends now.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(TRY_AGAIN)

    def leave(self) -> None:
        """Lets it become void, with what it tells."""
        self._left = True

    def end(self) -> None:
        """Gives it back, unless it is left."""
        self._renewal.end(wait=not self._left)
        if self._left:
            return
        with suppress(HeadshareError, OSError):
            storage.remove_file(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.end()


def read(path: Path) -> dict[str, Any] | None:
    """What a lease tells; None if there is none, and nothing if it is garbled."""
    try:
        with storage.reached(path):
            found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        if isinstance(error, HeadshareError):
            raise
        return {}
    return found if isinstance(found, dict) else {}


def _machine() -> str:
    """What processes have in common that know each other by their numbers; nothing where that cannot be told."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether a lease's holder was a process of this machine, and is no more."""
    machine, pid = _machine(), holder.get("pid")
    return bool(machine) and holder.get("machine") == machine and isinstance(pid, int) and not runs(pid)


def check_free(path: Path, holder: dict[str, Any]) -> None:
    """Raises TryAgain unless the process that a lease names has ended."""
    if not _has_ended(holder) and not is_void(path):
        raise TryAgain(refusal(path, holder))


def is_void(path: Path) -> bool:
    """Whether a lease was not renewed for so long that its holder has ended; one that is gone is void."""
    now = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.now")
    try:
        with storage.reached(path):
            now.write_bytes(b"")
        return storage.modified(now) - storage.modified(path) >= SECONDS
    except FileNotFoundError:
        return True
    finally:
        storage.remove_file(now)


def refusal(path: Path, holder: dict[str, Any]) -> str:
    """What is said to a process that does not get a lease."""
    who = f"The process {holder.get('pid')} on {holder.get('host')}"
    return (
        f"{who} is at work in {path.parent} since {holder.get('since')} ({path.name}); wait until it has ended. If it "
        f"was killed, the same command goes on {SECONDS:.0f} seconds after that."
    )
