"""Which process has a file or folder: marks in names, and locks of folders that one process at a time may write to.

On one machine the system's own file locks tell, which end with their process. Where a file system has none, or other
machines share it, host and process number tell; and as those say nothing of another machine's process that was killed,
a holder touches its lock's file while it runs, and the lock is void some time after that ended. In a bucket a lock is a
lease, which works in the same way.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headshare_jax.convert import leases, storage
from headshare_jax.errors import HeadshareError, TryAgain
from headshare_jax.signals import deferred

logger = logging.getLogger(__name__)

# Not so on Windows.
HAS_FILE_LOCKS = find_spec("fcntl") is not None
# In a folder that is held.
NAME = ".headshare.lock"
# As a pattern, with the host and the number of the process.
MARK = r"(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{6}"


def mark() -> str:
    """A text for names of files that tells this process from others, of this and other machines; new every time."""
    return f"{_host()}-{os.getpid()}-{secrets.token_hex(3)}"


def keep(path: Path) -> int:
    """Opens a file or folder that this process has made, and locks it until that is closed: see `abandoned`."""
    opened = os.open(path, os.O_RDONLY)
    _lock(opened)
    return opened


def abandoned(path: Path, found: re.Match[str]) -> bool:
    """Whether the process that made a file or folder, which has its mark in the name, has ended on this machine."""
    pid = int(found["pid"])
    if found["host"] != _host() or (pid != os.getpid() and leases.runs(pid)):
        return False
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _lock(opened) is not False
    finally:
        os.close(opened)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder until the block ends.

    Where the holder is on another machine and was killed, the next one gets it `leases.SECONDS` later.

    Raises:
      TryAgain: another process has it.
      HeadshareError: the folder cannot be written to.
    """
    path = folder / NAME
    if storage.in_bucket(folder):
        with leases.Lease(path) as lease:
            if lease.found is not None:
                logger.warning(
                    "The folder %s was left by process %s, which was killed or cut off.",
                    folder,
                    lease.found.get("pid"),
                )
            try:
                yield
            except TryAgain:
                # If it is the bucket that is not reached, giving the lease back would be tried for long, in vain.
                lease.leave()
                raise
        return
    try:
        with deferred():
            opened = _taken(folder)
    except OSError as error:
        raise HeadshareError(f"The folder {folder} cannot be locked ({error.strerror}).") from error
    renewal = leases.Renewal(lambda: os.utime(opened))
    try:
        yield
    finally:
        with deferred():
            renewal.end()
            # Removed while it is locked, so that nobody has it in between.
            path.unlink(missing_ok=True)
            os.close(opened)


def _taken(folder: Path) -> int:
    """The lock's file, open and locked, with this process in it."""
    path = folder / NAME
    while True:
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(opened)
            holder = _holder(opened)
            if locked is False or (_has_it(holder, locked) and not _is_void(path, holder)):
                raise TryAgain(_refusal(path, holder))
            with suppress(FileNotFoundError):
                # Its last holder may have removed it just now.
                if os.path.samestat(os.fstat(opened), path.stat()):
                    if holder:
                        logger.warning("The folder %s was left by process %d, which was killed.", folder, holder["pid"])
                    os.ftruncate(opened, 0)
                    os.pwrite(opened, json.dumps(leases.me()).encode(), 0)
                    return opened
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)


def _has_it(holder: dict[str, Any], locked: bool | None) -> bool:
    """Whether the process that a lock's file names still has it, though the system's own lock is free or not known."""
    if not holder:
        return False
    if holder["host"] != socket.gethostname():
        return True
    return locked is None and holder["pid"] != os.getpid() and leases.runs(holder["pid"])


def _is_void(path: Path, holder: dict[str, Any]) -> bool:
    """Whether another machine's process would have touched its lock since, by the clock of the file system."""
    if holder["host"] == socket.gethostname() or "lease_seconds" not in holder:
        return False
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime >= leases.SECONDS


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    if not holder:
        return f"Another process has the folder {path.parent}; wait until it has ended."
    who = f"The process {holder['pid']} on {holder['host']} has the folder {path.parent} since {holder['since']}"
    if holder["host"] == socket.gethostname():
        return f"{who}; wait until it has ended, or stop it."
    if "lease_seconds" in holder:
        return f"{who}; wait until it has ended. If it was killed, try again {leases.SECONDS:.0f} seconds after that."
    return f"{who}; wait until it has ended. If there is no such process there any more, delete {path}."


def _holder(opened: int) -> dict[str, Any]:
    """Who is named in a lock's file; nobody, if its process was killed as it took or left it."""
    try:
        found = json.loads(os.pread(opened, 1000, 0))
        return found | {"host": str(found["host"]), "pid": int(found["pid"]), "since": str(found["since"])}
    except (ValueError, KeyError, TypeError):
        return {}


def _lock(opened: int) -> bool | None:
    """Locks an open file until it is closed; False if another process has it, None if the system has no such locks."""
    if not HAS_FILE_LOCKS:
        return None
    import fcntl

    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
