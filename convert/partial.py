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

from headshare_jax.convert import bucket_outputs, locks, storage
from headshare_jax.signals import deferred

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"\.(?P<name>.+)\.{locks.MARK}\.(?P<state>partial|old)(?P<suffix>\.[^.]+)?", re.DOTALL)
# Of this process, written down before they exist; what is left of them goes when the process ends.
_begun: set[Path] = set()


@contextmanager
def unfinished(path: Path, *, folder: bool) -> Iterator[Path]:
    """A new file or folder beside `path`, to be filled and then given its name; if it is not, it is removed.

    A file's ending stays, since writers choose their format by it.
    """
    stem, suffix = (path.name, "") if folder else (path.stem, path.suffix)
    partial = path.with_name(f".{stem}.{locks.mark()}.partial{suffix}")
    _begun.add(partial)
    try:
        with deferred():
            if folder:
                partial.mkdir()
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
    place = Path(tempfile.gettempdir(), "headshare")
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


def recover(path: Path) -> None:
    """Puts right, in the folder of an output, what killed processes left there, and says so.

    In a bucket it is what they left of this output; see `bucket_outputs`.
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
            else:
                _remove(left)
                logger.warning("%s is removed, which a killed process had left.", left)


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
