"""Outputs that appear under their final name complete, or not at all."""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headshare_jax.errors import HeadshareError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raises HeadshareError if `path` cannot become an output: it exists, or its folder does not."""
    if path.exists() and not overwrite:
        raise HeadshareError(f"The output {path} exists already; choose another name or pass --overwrite.")
    if not path.absolute().parent.is_dir():
        raise HeadshareError(f"The folder {path.absolute().parent} for the output does not exist; create it first.")


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends without an error.

    Until then an old output under that name stays as it is. After an error the new folder is removed; after a kill
    it is left behind under a hidden name that ends in `.partial`.

    Raises:
      HeadshareError: `path` exists and `overwrite` is false, or it cannot be written.
    """
    check_output(path, overwrite=overwrite)
    if path.exists() and not path.is_dir():
        raise HeadshareError(f"The output {path} is a file, not a folder; choose another name.")
    with _explained(path):
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.absolute().parent))
        try:
            partial.chmod(0o777 & ~_umask())
            yield partial
            _take_place(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A file name to write to, which takes the name `path` when the block ends without an error.

    Raises:
      HeadshareError: `path` exists and `overwrite` is false, or it cannot be written.
    """
    check_output(path, overwrite=overwrite)
    if path.is_dir():
        raise HeadshareError(f"The output {path} is a folder, not a file; choose another name.")
    with _explained(path):
        # The ending is kept: writers choose their format by it.
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".partial{path.suffix}", dir=path.absolute().parent)
        os.close(handle)
        partial = Path(name)
        try:
            partial.chmod(0o666 & ~_umask())
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _take_place(partial: Path, path: Path) -> None:
    if not path.exists():
        os.rename(partial, path)
        return
    if _exchange(partial, path):
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.absolute().parent))
    os.rename(path, old)
    os.rename(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step, so that there is no moment without an output; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(one.absolute()), os.fsencode(other.absolute()))
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise HeadshareError(f"Cannot write {path}: {reason}; nothing was left under that name.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
