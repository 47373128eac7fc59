"""What a checkpoint of a run says of itself: a document with a checksum of its own, written when all else is there."""

import json
from pathlib import Path
from typing import Any

from headshare_jax.convert import storage
from headshare_jax.convert.atomic import own_file
from headshare_jax.convert.native_document import checksum
from headshare_jax.errors import HeadshareError

DOCUMENT, ARRAYS = "checkpoint.json", "arrays"
FORMAT = "headshare-postshare"
_VERSION = 2


def write(folder: Path, document: dict[str, Any]) -> None:
    """Writes it, which makes the checkpoint a whole one."""
    content = {"format": FORMAT, "version": _VERSION, **document}
    with own_file(folder / DOCUMENT) as path:
        path.write_text(json.dumps({"checksum": _checksum(content), **content}, indent=1), encoding="utf-8")


def is_whole(folder: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    return storage.is_file(folder / DOCUMENT)


def whole_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a run's folder of them, ascending; none if it is not there."""
    entries = folder.iterdir() if storage.is_folder(folder) else ()
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and is_whole(entry))


def read(folder: Path) -> dict[str, Any]:
    """What was written.

    Raises:
      HeadshareError: it is unreadable, damaged or of something else.
    """
    path = folder / DOCUMENT
    try:
        with storage.reached(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HeadshareError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise HeadshareError(f"{folder} is not a checkpoint of a PostShare run")
    if content.get("version") != _VERSION:
        raise HeadshareError(f"{folder} was written by a release that this one does not know")
    if content.pop("checksum", None) != _checksum(content):
        raise HeadshareError(f"{path} is damaged or was edited")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return checksum(json.dumps(content, sort_keys=True).encode())
