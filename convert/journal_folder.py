"""Journals on disk: a folder for each piece of work, and in it a file for each finished step."""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from headshare_jax.convert import storage
from headshare_jax.convert.atomic import check_place, new_directory, own_file
from headshare_jax.convert.locks import held
from headshare_jax.convert.partial import recover
from headshare_jax.convert.safetensors_files import SafetensorsReader, write_safetensors
from headshare_jax.errors import HeadshareError, TryAgain

logger = logging.getLogger(__name__)

# In each journal: what it belongs to, for those who read it; its folder's name is what tells journals apart.
KEY = "key.json"
# Among the arrays of a step: the SHA-256 of the others.
_SUM = "sha256"


class JournalFolder:
    """A folder of journals, a `journal.Journals`; work of another key or another release has a journal of its own.

    Args:
      path: the folder; made with its first journal.

    Raises:
      HeadshareError: it cannot be made, is a file, or holds something else than journals.

    Examples:
      >>> journals = hs.JournalFolder("work")
      >>> scores = hs.match_functional(model, windows, journals=journals)
    """

    def __init__(self, path: str | Path):
        path = storage.path(path)
        check_place(path, folder=True)
        recover(path / KEY)
        foreign = next((entry for entry in path.glob("[!.]*") if not (entry / KEY).is_file()), None)
        if foreign is not None:
            raise HeadshareError(
                f"{foreign} is no journal of finished layers, and nothing else may lie beside those; choose another "
                "folder."
            )
        self.path = path

    def of(self, work: str, key: Mapping[str, Any]) -> "_FolderJournal":
        """The journal of a kind of work and of what it depends on, made if it does not exist.

        Raises:
          HeadshareError: it cannot be written.
        """
        self._make()
        text = json.dumps({"release": importlib.metadata.version("headshare-jax"), **key}, sort_keys=True, indent=1)
        folder = self.path / f"{work}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if not folder.exists():
            with new_directory(folder) as partial:
                (partial / KEY).write_text(text, encoding="utf-8")
        recover(folder / KEY)
        return _FolderJournal(folder)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes out of the folder until the block ends.

        Raises:
          TryAgain: another process is at work there.
        """
        self._make()
        with held(self.path):
            yield

    def _make(self) -> None:
        if not self.path.exists():
            with new_directory(self.path):
                pass


class _FolderJournal:
    """A `journal.Journal` whose steps are safetensors files."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, step: str) -> dict[str, np.ndarray] | None:
        file = self._file(step)
        if not file.is_file():
            return None
        reader = SafetensorsReader([file])
        try:
            infos, _ = reader.infos()
            arrays = {name: reader.read(info, name) for name, info in infos.items()}
        except TryAgain:
            raise
        except HeadshareError:
            arrays = {_SUM: np.zeros(0, np.uint8)}
        # Journals of 0.1.0 have no checksums.
        kept = arrays.pop(_SUM, None)
        if kept is not None and not np.array_equal(kept, _checksum(arrays)):
            logger.warning("%s is damaged; what it held is computed again.", file)
            return None
        return arrays

    def write(self, step: str, arrays: Mapping[str, np.ndarray]) -> None:
        arrays = {**arrays, _SUM: _checksum(arrays)}
        layout = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        with own_file(self._file(step)) as partial:
            write_safetensors(partial, layout, lambda name: [lambda: arrays[name]])

    def _file(self, step: str) -> Path:
        return self.folder / f"{step}.safetensors"


def _checksum(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
