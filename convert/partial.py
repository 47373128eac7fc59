"""Files and folders that are not finished: under hidden names, and gone with the process that made them.

Their names tell which process that is, so that what a killed one leaves is known, and cleared by the next.
"""

import atexit
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headshare_jax.convert import bucket_outputs, locks, storage, written
from headshare_jax.signals import deferred

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"\.(?P<name>.+)\.{locks.MARK}\.(?P<state>partial|old)(?P<suffix>\.[^.]+)?", re.DOTALL)
# Of this process, written down before they exist; what is left of them goes when the process ends.
_begun: set[Path] = set()


@contextmanager
def unfinished(path: Path, *, folder: bool, key: str | None = None) -> Iterator[Path]:
    """A new file or folder beside `path`, to be filled and then given its name; if it is not, it is removed.

    A file's ending stays, since writers choose their format by it. With a key, what a killed process left of a folder
    with the same key (see `written`) is that folder; what it left with another is removed.
    """
    stem, suffix = (path.name, "") if folder else (path.stem, path.suffix)
    partial = path.with_name(f".{stem}.{locks.mark()}.partial{suffix}")
    _begun.add(partial)
    try:
        with deferred():
            if folder:
                _go_on(path, key, partial)
            else:
                partial.touch(exist_ok=False)
            mine = locks.keep(partial)
        try:
            yield partial
        finally:
            os.close(mine)
    finally:
        with deferred():
            _remove(partial)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder among the system's temporary files that goes with the block."""
    # Named by the process: those of others that run are no concern of its own, and no word is due.
    place = Path(tempfile.gettempdir(), f"headshare-{os.getpid()}")
    recover(place)
    with unfinished(place, folder=True) as folder:
        folder.chmod(0o700)
        yield folder


def take_place(partial: Path, path: Path) -> None:
    """Gives a finished folder its name; an old one of that name is gone only when the new one has it.

    No portable call exchanges two folders, so for a moment the old one has a hidden name; `recover` gives it back.
    """
    with deferred():
        if not path.exists():
            os.rename(partial, path)
            return
        old = path.with_name(f".{path.name}.{locks.mark()}.old")
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except BaseException:
            os.rename(old, path)
            raise
        # From here on nobody must take it for whole.
        gone = old.with_suffix(".partial")
        os.rename(old, gone)
        _remove(gone)


def _go_on(path: Path, key: str | None, partial: Path) -> None:
    """Makes a folder, of what a killed process left of the same if there is such."""
    for left in _left(path):
        if key is not None and not partial.exists() and written.belongs(left, key):
            os.rename(left, partial)
            logger.warning("%s is gone on with where a killed process had stopped.", path)
        else:
            _remove(left)
            logger.warning("%s is removed, which a killed process had left.", left)
    if not partial.exists():
        partial.mkdir()


def _left(path: Path) -> Iterator[Path]:
    """Unfinished folders of an output that a killed process left and that can be gone on with."""
    for entry in _entries(path.parent):
        found = _NAME.fullmatch(entry.name)
        if found is not None and found["name"] == path.name and not found["suffix"] and found["state"] == "partial":
            left = Path(entry.path)
            if left not in _begun and written.are_in(left) and locks.abandoned(left, found):
                yield left


def left_bytes(path: Path) -> int:
    """Bytes that a killed process left of an output, which need no room any more."""
    return sum(sum(storage.files(left).values()) for left in _left(path))


def recover(path: Path) -> None:
    """Puts right, in the folder of an output, what killed processes left there, and says so.

    What can be gone on with stays for who writes that output. In a bucket it is what they left of this output; see
    `bucket_outputs`.
    """
    if storage.in_bucket(path):
        bucket_outputs.recover(path)
        return
    for entry in _entries(path.parent):
        found = _NAME.fullmatch(entry.name)
        if found is None:
            continue
        left, name = Path(entry.path), f"{found['name']}{found['suffix'] or ''}"
        with suppress(OSError):
            if left in _begun:
                continue
            if not locks.abandoned(left, found):
                if name == path.name:
                    logger.warning("%s is of another process that writes this output; delete it if that ended.", left)
            elif found["state"] == "old" and not left.with_name(name).exists():
                os.rename(left, left.with_name(name))
                logger.warning("%s is back: a process was killed as it replaced it.", left.with_name(name))
            elif not written.are_in(left):
                _remove(left)
                logger.warning("%s is removed, which a killed process had left.", left)
            elif name != path.name:
                logger.warning("%s is half of %s; write that again to go on, or delete it.", left, name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _remove(path: Path) -> None:
    """Removes a file or folder for good: a library that was interrupted may have threads that still write into it."""
    for _ in range(20):
        if not os.path.lexists(path):
            return
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
        if os.path.lexists(path):
            time.sleep(0.05)


@atexit.register
def _last_resort() -> None:
    for path in _begun:
        _remove(path)
