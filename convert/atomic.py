"""Outputs that appear under their final name complete, or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headshare_jax.convert import bucket_outputs, origin, storage
from headshare_jax.convert.partial import recover, take_place, temporary_folder, unfinished
from headshare_jax.errors import HeadshareError


def check_output(path: Path, *, folder: bool, overwrite: bool, keep: tuple[Path, ...] = ()) -> None:
    """Raises HeadshareError if `path` cannot become an output.

    Args:
      path: it must have a folder to lie in that can be written to.
      folder: the output is a folder, and replaces no file; otherwise it is a file, and replaces no folder.
      overwrite: it may exist, if it is empty or this program wrote all of it (see `origin`); but a folder that holds
        the working directory or the home folder is never replaced.
      keep: files and folders that the output is made from: neither they, nor what they lie in, nor what lies in them
        is replaced.
    """
    path = check_place(path, folder=folder)
    if not path.exists() or bucket_outputs.is_unfinished(path):
        return
    for kept in map(_resolved, keep):
        if kept == path:
            raise HeadshareError(f"The output {path} is what the model is read from; choose another name.")
        if storage.is_within(path, kept):
            raise HeadshareError(f"The output {path} is part of {kept}, which is read; choose another name.")
    if not overwrite:
        raise HeadshareError(
            f"The output {path} exists already; choose another name, or overwrite it.", option="overwrite"
        )
    never = [Path.cwd(), _resolved(Path(os.path.expanduser("~"))), *map(_resolved, keep)]
    lost = [kept for kept in never if storage.is_within(kept, path)]
    if lost:
        raise HeadshareError(f"The folder {path} holds {lost[0]}, so it is not replaced; choose another name.")
    with _explained(path):
        origin.check(path)


def check_place(path: Path, *, folder: bool) -> Path:
    """Raises HeadshareError if no file or folder can have this path; else returns it, absolute.

    What killed processes left in its place is put right first.
    """
    path = _resolved(path)
    if storage.in_bucket(path):
        bucket_outputs.check_place(path)
    elif not path.parent.is_dir():
        raise HeadshareError(f"The folder {path.parent} for the output does not exist; create it first.")
    elif not os.access(path.parent, os.W_OK):
        raise HeadshareError(
            f"The folder {path.parent} cannot be written to; choose another, or change its permissions."
        )
    else:
        recover(path)
    if path.exists() and path.is_dir() != folder:
        found, wanted = ("file", "folder") if folder else ("folder", "file")
        raise HeadshareError(f"The output {path} is a {found}, not a {wanted}; choose another name.")
    return path


@contextmanager
def new_directory(
    path: Path, *, overwrite: bool = False, keep: tuple[Path, ...] = (), key: str | None = None
) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends without an error.

    Until then an old output under that name stays as it is. After an error the new folder is removed; after a kill it
    is left behind, on this machine under a hidden name, and the next output there removes it. If it holds notes of what
    is in it (`written`), it stays, and is the new folder where `path` is written again with the same key.

    Raises:
      HeadshareError: `path` cannot become an output (see `check_output`), or cannot be written.
    """
    check_output(path, folder=True, overwrite=overwrite, keep=keep)
    path = _resolved(path)
    if storage.in_bucket(path):
        with _explained(path), bucket_outputs.folder(path, key) as partial:
            yield partial
        return
    with _explained(path), unfinished(path, folder=True, key=key) as partial:
        yield partial
        check_output(path, folder=True, overwrite=overwrite, keep=keep)
        take_place(partial, path)


@contextmanager
def new_file(path: Path, *, overwrite: bool = False, keep: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A file name to write to, which takes the name `path` when the block ends without an error.

    Raises:
      HeadshareError: `path` cannot become an output (see `check_output`), or cannot be written.
    """
    check_output(path, folder=False, overwrite=overwrite, keep=keep)
    path = _resolved(path)
    if storage.in_bucket(path):
        with _explained(path), bucket_outputs.lease(path), _uploaded(path) as partial:
            yield partial
        return
    with _explained(path), unfinished(path, folder=False) as partial:
        yield partial
        check_output(path, folder=False, overwrite=overwrite, keep=keep)
        os.replace(partial, path)


@contextmanager
def new_long_file(
    path: Path, *, overwrite: bool = False, keep: tuple[Path, ...] = (), key: str | None = None
) -> Iterator[Path]:
    """As `new_file`, for what takes long to write: the file lies in a folder of its own, which is as a `new_directory`.

    Raises:
      HeadshareError: as of `new_file`.
    """
    check_output(path, folder=False, overwrite=overwrite, keep=keep)
    path = _resolved(path)
    if storage.in_bucket(path):
        with _explained(path), bucket_outputs.folder(path, key, is_file=True) as folder:
            yield folder / path.name
        return
    with _explained(path), unfinished(path, folder=True, key=key) as folder:
        yield folder / path.name
        check_output(path, folder=False, overwrite=overwrite, keep=keep)
        os.replace(folder / path.name, path)


@contextmanager
def own_file(path: Path) -> Iterator[Path]:
    """As `new_file`, for a file in a folder of ours, such as a run's: it replaces what has its name there."""
    if storage.in_bucket(path):
        with _explained(path), _uploaded(path) as partial:
            yield partial
        return
    path = check_place(path, folder=False)
    with _explained(path), unfinished(path, folder=False) as partial:
        yield partial
        os.replace(partial, path)


@contextmanager
def _uploaded(path: Path) -> Iterator[Path]:
    """A file of this machine to write to, which is put into a bucket at the end."""
    with temporary_folder() as folder:
        (folder / path.name).touch()
        yield folder / path.name
        storage.upload(folder / path.name, path)


def _resolved(path: Path) -> Path:
    """The absolute path behind symbolic links, so that a linked output is replaced rather than its link."""
    try:
        resolved = storage.absolute(path)
        # Fails on a name that no file can have.
        resolved.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise HeadshareError(f"The path {str(path)[:200]!r} cannot be used: {error}.") from error
    return resolved


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except HeadshareError:
        raise
    except Exception as error:
        if refusal := storage.refusal_at(error, path, f"The output {path}"):
            raise refusal from error
        if not isinstance(error, OSError):
            raise
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise HeadshareError(f"Cannot write {path}: {reason}; what was there before is unchanged.") from error
