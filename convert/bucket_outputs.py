"""Outputs in a bucket: written in place, their marker last, or first beside what they replace.

A lease beside an output tells where it is written. If its process is killed, the next one to come there finds by it
what to clear away, to bring to its end, or to go on with.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from headshare_jax.convert import leases, storage, written
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


def is_unfinished(path: Path) -> bool:
    """Whether what has an output's name is no output yet, but the half of one that can be gone on with."""
    return storage.in_bucket(path) and written.are_in(path)


@contextmanager
def folder(path: Path, key: str | None = None, *, is_file: bool = False) -> Iterator[Path]:
    """A folder to fill, which is that of the output unless there is one; then it is copied there at the end.

    What was there before stays until the new folder is whole. After an error the new one is removed. With a key, what a
    killed process left with the same key (see `written`) is that folder.

    Args:
      path: the output.
      key: what is written.
      is_file: the output is no folder, but the file of its name in the one to fill.

    Raises:
      TryAgain: another process writes this output, or the bucket was not reached.
      HeadshareError: it cannot be written.
    """
    with lease(path, key) as (mine, left):
        begun = left or (_beside(path) if is_file or path.exists() else path)
        mine.tell(folder=begun.name, whole=False)
        try:
            with storage.reached(path):
                yield begun
            mine.tell(folder=begun.name, whole=True, is_file=is_file)
        except TryAgain:
            # A bucket that is not reached cannot be put right; whoever comes next will do it, or go on.
            mine.leave()
            raise
        except BaseException:
            with deferred(), suppress(HeadshareError, OSError):
                storage.remove(begun)
            raise
        with _left_if_it_fails(mine), deferred():
            _put_in_place(begun, path, is_file=is_file)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


@contextmanager
def lease(path: Path, key: str | None = None) -> Iterator[tuple[Lease, Path | None]]:
    """The lease of an output, after what its last holder left is put right, and the folder to go on with; see `folder`.

    Raises:
      TryAgain, HeadshareError: as of `folder`.
    """
    with Lease(lease_of(path)) as mine:
        with _left_if_it_fails(mine):
            left = None if mine.found is None else _put_right(path, mine.found, key)
        yield mine, left


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
    found = leases.read(lease_of(path))
    if found is None:
        return
    begun = _begun(path, found)
    if begun is not None and found.get("whole") is not True and written.are_in(begun):
        # It stays for who writes this output.
        leases.check_free(lease_of(path), found)
        return
    with lease(path):
        pass


def _begun(path: Path, told: dict[str, Any]) -> Path | None:
    """The folder that a lease tells of; none if what is written is a single file."""
    return next((place for place in (path, _beside(path)) if place.name == told.get("folder")), None)


def _put_right(path: Path, told: dict[str, Any], key: str | None) -> Path | None:
    """Clears away what a killed process left, or brings it to its end; the folder of it that is to be gone on with."""
    begun = _begun(path, told)
    if begun is None:
        # A file appears whole; parts of an upload that was not ended are not seen, but paid for.
        storage.end_uploads(path)
    elif told.get("whole") is True:
        _put_in_place(begun, path, is_file=told.get("is_file") is True)
        logger.warning("%s is whole: a process was killed as it put it in place.", path)
    elif key is not None and written.belongs(begun, key):
        storage.end_uploads(begun)
        logger.warning("%s is gone on with where a killed process had stopped.", path)
        return begun
    else:
        storage.remove(begun)
        logger.warning("%s is removed, which a killed process had left unfinished.", begun)
    return None


def _put_in_place(begun: Path, path: Path, *, is_file: bool) -> None:
    """Copies what is whole to where it belongs, in place of what is there; to be done again if it is interrupted."""
    if begun == path:
        return
    if is_file:
        storage.copy(begun / path.name, path)
    else:
        _copy_folder(begun, path)
    storage.remove(begun)


def _copy_folder(begun: Path, path: Path) -> None:
    new, old = storage.files(begun), storage.files(path)
    first, last = ([name for name in new if (name in _MARKERS) == is_marker] for is_marker in (False, True))
    for name in filter(old.__contains__, _MARKERS):
        storage.remove_file(path / name)
    with ThreadPoolExecutor(_COPIES) as threads:
        list(threads.map(lambda name: storage.copy(begun / name, path / name), first))
        list(threads.map(lambda name: storage.remove_file(path / name), old.keys() - new.keys()))
    for name in last:
        storage.copy(begun / name, path / name)


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
