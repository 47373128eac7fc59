"""Sharing maps on disk."""

from pathlib import Path

from headshare_jax.convert import storage
from headshare_jax.errors import HeadshareError, explained
from headshare_jax.sharing.map import SharingMap

# Beside an exported Hugging Face model.
NAME = "headshare_map.json"


def read(path: Path) -> SharingMap:
    """Reads a sharing map; HeadshareError if there is none or it is not one."""
    try:
        with storage.reached(path):
            text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise HeadshareError(f"There is no map {path}; check its name and folder.") from error
    except OSError as error:
        raise HeadshareError(explained(error)) from error
    except HeadshareError:
        raise
    except UnicodeDecodeError as error:
        raise HeadshareError(f"The map {path} cannot be read: {error}.") from error
    try:
        return SharingMap.from_json(text)
    except HeadshareError as error:
        raise HeadshareError(f"{path}: {error}") from error
