"""The folder for what can be made or fetched again."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$HEADSHARE_CACHE`, or `headshare` in the user's cache folder."""
    if "HEADSHARE_CACHE" in os.environ:
        return Path(os.environ["HEADSHARE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headshare"
