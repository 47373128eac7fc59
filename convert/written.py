"""What an unfinished output already holds: its parts and their checksums, so that who was killed can go on.

They are written down in a file in the unfinished folder: a line that tells what the output is made from, and a line for
every part that has been written since.
"""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from headshare_jax.convert import storage
from headshare_jax.parameters import parameter_names
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import CastView

NAME = ".headshare-written"
# That read a source ahead of who writes it. Each has a slice in work, so there are few.
THREADS = 2


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


def belongs(folder: Path, key: str) -> bool:
    """Whether an unfinished folder is to become what a key stands for."""
    try:
        with (folder / NAME).open(encoding="utf-8") as file:
            return file.readline() == _line(key)
    except (OSError, ValueError):
        return False


@contextmanager
def notes(folder: Path, key: str | None) -> Iterator["Written"]:
    """The notes of a folder that is being written; nothing is noted in a bucket, or without a key."""
    found = Written(0 if key is None else THREADS)
    if key is not None and not storage.in_bucket(folder):
        found.begin(folder, key)
    with closing(found):
        yield found


class Written:
    """Notes of the parts of an unfinished folder.

    Attributes:
      threads: that may read the source ahead of who writes it.
    """

    def __init__(self, threads: int = 0) -> None:
        """Notes that nothing is written down in."""
        self.threads = threads
        self._path: Path | None = None
        self._file: IO[str] | None = None
        self._sums: dict[str, list[str]] = {}

    def begin(self, folder: Path, key: str) -> None:
        """Reads what a folder has, and writes down what is added."""
        self._path = folder / NAME
        if belongs(folder, key):
            self._sums = dict(_parts(self._path))
        self._file = self._path.open("w", encoding="utf-8")
        self._file.write(_line(key))
        for part, sums in self._sums.items():
            self._file.write(_line([part, sums]))
        self._file.flush()

    def sums(self, part: str) -> list[str] | None:
        """The checksums of a part that was written before; None if it was not."""
        return self._sums.get(part)

    def add(self, part: str, sums: list[str]) -> None:
        """Notes a part that lies in its file."""
        if self._file is not None:
            self._file.write(_line([part, sums]))
            self._file.flush()

    def close(self) -> None:
        """Adds nothing more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def end(self) -> None:
        """Takes the notes away: all is written."""
        self.close()
        if self._path is not None:
            self._path.unlink()
            self._path = None


def _line(value: object) -> str:
    return f"{json.dumps(value)}\n"


def _parts(path: Path) -> list[tuple[str, list[str]]]:
    """As far as lines are whole; the last may not be."""
    found: list[tuple[str, list[str]]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        try:
            part, sums = json.loads(line)
        except (ValueError, TypeError):
            break
        found.append((part, sums))
    return found
