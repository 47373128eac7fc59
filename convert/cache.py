"""The folder for what can be made or fetched again."""

import os
from pathlib import Path

from headshare_jax.convert import storage
from headshare_jax.errors import HeadshareError


def cache_directory() -> Path:
    """`$HEADSHARE_CACHE`, or `headshare` in the user's cache folder; a name that is set to nothing counts as not set.

    Raises:
      HeadshareError: the user has no home folder.
    """
    if named := os.environ.get("HEADSHARE_CACHE"):
        return storage.path(named)
    return local_cache()


def local_cache() -> Path:
    """The same for what has to lie on this machine: where the cache is in a bucket, that in the user's cache folder.

    Raises:
      HeadshareError: the user has no home folder.
    """
    named = storage.path(os.environ.get("HEADSHARE_CACHE", ""))
    if str(named) != "." and not storage.in_bucket(named):
        return named
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headshare"
    except RuntimeError as error:
        raise HeadshareError("There is no home folder for the cache; name a folder in HEADSHARE_CACHE.") from error
