"""Whether something is there. Of a bucket that is not reached that is not known, where paths of their own say no."""

from pathlib import Path
from typing import Any, cast

from headshare_jax.convert import storage
from headshare_jax.errors import TryAgain


def is_file(path: Path) -> bool:
    """Whether there is a file; raises TryAgain if the bucket is not reached."""
    return _kind(path) == "file" if storage.in_bucket(path) else path.is_file()


def is_folder(path: Path) -> bool:
    """Whether there is a folder; raises TryAgain if the bucket is not reached."""
    return _kind(path) == "directory" if storage.in_bucket(path) else path.is_dir()


def _kind(path: Path) -> str | None:
    """What is at a place in a bucket: `file` or `directory`; None if nothing can be seen there."""
    place = cast(Any, path)
    try:
        return str(place.fs.info(place.path)["type"])
    except Exception as error:
        if isinstance(refused := storage.refusal_at(error, path), TryAgain):
            raise refused from error
        return None
