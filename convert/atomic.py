"""Outputs that appear under their final name complete, or not at all."""

import errno
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headshare_jax.errors import HeadshareError

logger = logging.getLogger(__name__)


def check_output(path: Path, *, folder: bool, overwrite: bool, keep: tuple[Path, ...] = ()) -> None:
    """Raises HeadshareError if `path` cannot become an output.

    Args:
      path: it must have a folder to lie in that can be written to.
      folder: the output is a folder, and replaces no file; otherwise it is a file, and replaces no folder.
      overwrite: it may exist; but a folder that holds the working directory or the home folder is never replaced.
      keep: what must not be lost with an old folder, because it lies inside.
    """
    path = _resolved(path)
    if not path.parent.is_dir():
        raise HeadshareError(f"The folder {path.parent} for the output does not exist; create it first.")
    if not os.access(path.parent, os.W_OK):
        raise HeadshareError(
            f"The folder {path.parent} cannot be written to; choose another, or change its permissions."
        )
    if not path.exists():
        return
    if path.is_dir() != folder:
        found, wanted = ("file", "folder") if folder else ("folder", "file")
        raise HeadshareError(f"The output {path} is a {found}, not a {wanted}; choose another name.")
    if not overwrite:
        raise HeadshareError(
            f"The output {path} exists already; choose another name, or overwrite it.", option="overwrite"
        )
    never = [Path.cwd(), _resolved(Path(os.path.expanduser("~")))]
    lost = [kept for kept in never if kept.is_relative_to(path)]
    lost += [kept for kept in keep if path in _resolved(kept).parents]
    if lost:
        raise HeadshareError(f"The folder {path} holds {lost[0]}, so it is not replaced; choose another name.")


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False, keep: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends without an error.

    Until then an old output under that name stays as it is; it is never changed or deleted before the new one has the
    name. After an error the new folder is removed; after a kill it is left behind under a hidden name that ends in
    `.partial`. No portable call exchanges two folders, so the old one is renamed first, to a hidden name that ends in
    `.old`, and a kill between the two renamings leaves it whole there. The next to make this output is told of either.

    Raises:
      HeadshareError: `path` cannot become an output (see `check_output`), or cannot be written.
    """
    check_output(path, folder=True, overwrite=overwrite, keep=keep)
    path = _resolved(path)
    with _explained(path):
        _tell_leftovers(path.parent, path.name, ".partial")
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            partial.chmod(0o777 & ~_umask())
            yield partial
            check_output(path, folder=True, overwrite=overwrite, keep=keep)
            _take_place(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A file name to write to, which takes the name `path` when the block ends without an error.

    Raises:
      HeadshareError: `path` cannot become an output (see `check_output`), or cannot be written.
    """
    check_output(path, folder=False, overwrite=overwrite)
    path = _resolved(path)
    with _explained(path):
        _tell_leftovers(path.parent, path.stem, f".partial{path.suffix}")
        # The ending is kept: writers choose their format by it.
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".partial{path.suffix}", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            partial.chmod(0o666 & ~_umask())
            yield partial
            check_output(path, folder=False, overwrite=overwrite)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _tell_leftovers(folder: Path, name: str, ending: str) -> None:
    """Names what killed processes left; it is not removed, for a process that writes at this moment looks the same."""
    for left in folder.glob(f".{glob.escape(name)}.*{glob.escape(ending)}"):
        logger.warning("%s was left by a process that was killed or is still writing; delete it if none is.", left)
    for old in folder.glob(f".{glob.escape(name)}.*.old"):
        logger.warning("%s is an output that a killed process was replacing; rename it to keep it, or delete it.", old)


def _take_place(partial: Path, path: Path) -> None:
    if not path.exists():
        os.rename(partial, path)
        return
    old = partial.with_suffix(".old")
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _resolved(path: Path) -> Path:
    """The absolute path behind symbolic links, so that a linked output is replaced rather than its link."""
    try:
        resolved = path.resolve()
        # Fails on a name that no file can have.
        resolved.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise HeadshareError(f"The path {str(path)[:200]!r} cannot be used: {error}.") from error
    return resolved


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise HeadshareError(f"Cannot write {path}: {reason}; what was there before is unchanged.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
