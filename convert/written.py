"""What an unfinished output already holds: its parts and their checksums, so that who was killed can go on.

They are written down in the unfinished folder: a line that tells what the output is made from, and a line for every
part that has been written since. On this machine they are a file; in a bucket, where nothing is appended, objects.
"""

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headshare_jax.ahead import in_order
from headshare_jax.convert import storage
from headshare_jax.parameters import parameter_names
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import CastView

NAME = ".headshare-written"
# That read a source ahead of who writes it. Each has a slice in work, so there are few.
THREADS = 2
# Of a bucket's notes, so many are fetched side by side.
_FETCHED = 16


def key(source: WeightSource, said: Any) -> str | None:
    """What an output is made from, where that is a checkpoint alone; None otherwise.

    Args:
      source: what is written.
      said: plain data on how.
    """
    base = source
    while isinstance(base, CastView):
        base = base.base
    path: Path | None = getattr(base, "path", None)
    if path is None or hasattr(base, "base"):
        return None
    files = [path] if path.is_file() else [path / name for name in storage.files(path)]
    types = {name: str(source.dtype(name)) for name in parameter_names(source.config)}
    return json.dumps([version("headshare-jax"), said, types, [storage.version(file) for file in files]])


def are_in(folder: Path) -> bool:
    """Whether an unfinished folder has notes, so that it can be gone on with."""
    return (folder / NAME).exists()


def belongs(folder: Path, key: str) -> bool:
    """Whether an unfinished folder is to become what a key stands for."""
    try:
        return next(_texts(folder), "").startswith(_line(key))
    except OSError:
        return False


class Written:
    """Notes of the parts of an unfinished folder.

    Args:
      folder: where they are written down; by default nowhere.
      key: what the folder is to become; without one, nothing is written down.

    Attributes:
      lasting: they are written down.
      threads: that may read the source ahead of who writes it.
    """

    def __init__(self, folder: Path | None = None, key: str | None = None) -> None:
        self.lasting = folder is not None and key is not None
        self.threads = THREADS if self.lasting else 0
        self._place: Path | None = None
        self._sums: dict[str, list[str]] = {}
        self._noted = 0
        if folder is not None and key is not None:
            self._begin(folder, key)

    def _begin(self, folder: Path, key: str) -> None:
        if belongs(folder, key):
            self._sums = dict(_parts("".join(_texts(folder))))
        self._place = folder / NAME
        self._note(_line(key), *(_line(part) for part in self._sums.items()))

    def _note(self, *lines: str) -> None:
        assert self._place is not None
        text = "".join(lines)
        if storage.in_bucket(self._place):
            with storage.reached(self._place):
                (self._place / f"{self._noted:08}").write_text(text, encoding="utf-8")
        else:
            with self._place.open("a" if self._noted else "w", encoding="utf-8") as file:
                file.write(text)
        self._noted += 1

    def sums(self, part: str) -> list[str] | None:
        """The checksums of a part that was written before; None if it was not."""
        return self._sums.get(part)

    def add(self, part: str, sums: list[str]) -> None:
        """Notes a part that lies in its file."""
        if self._place is not None:
            self._note(_line([part, sums]))

    def end(self) -> None:
        """Takes the notes away: all is written."""
        if self._place is None:
            return
        if storage.in_bucket(self._place):
            storage.remove(self._place)
        else:
            self._place.unlink()
        self._place = None


def _line(value: object) -> str:
    return f"{json.dumps(value)}\n"


def _texts(folder: Path) -> Iterator[str]:
    """The notes of a folder, in pieces that begin with the first line; OSError if there are none."""
    place = folder / NAME
    if not storage.in_bucket(folder):
        yield place.read_text(encoding="utf-8", errors="replace")
        return
    with storage.reached(folder):
        yield from in_order(
            lambda name: (place / name).read_text(encoding="utf-8"), storage.files(place), _FETCHED, _FETCHED
        )


def _parts(text: str) -> Iterator[tuple[str, list[str]]]:
    """As far as lines are whole; the last may not be."""
    for line in text.splitlines()[1:]:
        try:
            part, sums = json.loads(line)
        except (ValueError, TypeError):
            return
        yield part, sums
