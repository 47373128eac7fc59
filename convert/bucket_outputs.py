"""Outputs in a bucket: written in place, their marker last, or first beside what they replace.

A lease beside an output tells where it is written. If its process is killed, the next one to come there finds by it
what to clear away, or to bring to its end.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from headshare_jax.convert import leases, storage
from headshare_jax.convert.leases import Lease
from headshare_jax.errors import HeadshareError, TryAgain
from headshare_jax.signals import deferred

logger = logging.getLogger(__name__)

# A folder is taken for whole by these, so they are put there last and taken away first.
_MARKERS = ("headshare.json", "config.json", "config.yaml")
# Files that are copied at a time.
_COPIES = 16


def lease_of(path: Path) -> Path:
    """Beside an output: the lease of the process that writes it."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is that of the output unless there is one; then it is copied there at the end.

    What was there before stays until the new folder is whole. After an error the new one is removed.

    Raises:
      TryAgain: another process writes this output, or the bucket was not reached.
      HeadshareError: it cannot be written.
    """
    with lease(path) as mine:
        begun = path.with_name(f".{path.name}.new") if path.exists() else path
        mine.tell(folder=begun.name, whole=False)
        try:
            with storage.reached(path):
                yield begun
            mine.tell(folder=begun.name, whole=True)
        except TryAgain:
            # A bucket that is not reached cannot be put right; whoever comes next will do it.
            mine.leave()
            raise
        except BaseException:
            with deferred(), suppress(HeadshareError, OSError):
                storage.remove(begun)
            raise
        with _left_if_it_fails(mine), deferred():
            _put_in_place(begun, path)


@contextmanager
def lease(path: Path) -> Iterator[Lease]:
    """The lease of an output, after what its last holder left is put right; errors as of `folder`."""
    with Lease(lease_of(path)) as mine:
        if mine.found is not None:
            with _left_if_it_fails(mine):
                _put_right(path, mine.found)
        yield mine


@contextmanager
def _left_if_it_fails(mine: Lease) -> Iterator[None]:
    """Leaves a lease for whoever comes next, who does what the block could not."""
    try:
        yield
    except BaseException:
        mine.leave()
        raise


def recover(path: Path) -> None:
    """Puts right what a killed process left of an output, and says so; what it may not change stays as it is."""
    with suppress(OSError):
        try:
            _recover(path)
        except TryAgain as busy:
            logger.warning("%s", busy)
        except HeadshareError:
            return


def _recover(path: Path) -> None:
    """The same; raises TryAgain if another process writes this output."""
    if leases.read(lease_of(path)) is not None:
        with lease(path):
            pass


def _put_right(path: Path, left: dict[str, Any]) -> None:
    name = left.get("folder")
    if not isinstance(name, str) or name not in (path.name, f".{path.name}.new"):
        # A file appears whole; parts of an upload that was not ended are not seen, but paid for.
        storage.end_uploads(path)
    elif left.get("whole") is True:
        _put_in_place(path.with_name(name), path)
        logger.warning("%s is whole: a process was killed as it put it in place.", path)
    else:
        storage.remove(path.with_name(name))
        logger.warning("%s is removed, which a killed process had left unfinished.", path.with_name(name))


def _put_in_place(begun: Path, path: Path) -> None:
    """Copies a whole folder to where it belongs, in place of what is there; to be done again if it is interrupted."""
    if begun == path:
        return
    new, old = storage.files(begun), storage.files(path)
    first, last = ([name for name in new if (name in _MARKERS) == is_marker] for is_marker in (False, True))
    for name in filter(old.__contains__, _MARKERS):
        storage.remove_file(path / name)
    with ThreadPoolExecutor(_COPIES) as threads:
        list(threads.map(lambda name: storage.copy(begun / name, path / name), first))
        list(threads.map(lambda name: storage.remove_file(path / name), old.keys() - new.keys()))
    for name in last:
        storage.copy(begun / name, path / name)
    storage.remove(begun)


def check_place(path: Path) -> None:
    """Raises HeadshareError unless an output can be written to a bucket's path, TryAgain if that may be so later.

    What killed processes left there is put right first.
    """
    if storage.is_bucket(path):
        raise HeadshareError(f"The output {path} is a whole bucket; give it a name in there.")
    _recover(path)
    probe = path.with_name(f".{path.name}.probe")
    with storage.reached(path):
        probe.write_bytes(b"")
    storage.remove_file(probe)
