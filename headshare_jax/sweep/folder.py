"""The folder of a sweep: what it has measured so far, for which model, texts and settings; and its results."""

import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headshare_jax.convert import scores_file, storage
from headshare_jax.convert.atomic import new_directory, own_file
from headshare_jax.convert.huggingface import read_json
from headshare_jax.convert.journal_folder import JournalFolder
from headshare_jax.convert.locks import held
from headshare_jax.convert.partial import recover
from headshare_jax.errors import HeadshareError, one_sentence
from headshare_jax.report.page import page
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult

PAGE, DATA, TABLE = "index.html", "sweep.json", "points.csv"
# Of the table.
COLUMNS = (
    "method", "ratio", "budget", "receivers", "dropped", "slim", "units", "perplexity", "relative",
    "parameters", "attention_bytes", "bytes",
)  # fmt: skip
# Inside the sweep's folder; needed only to go on.
CACHE = "cache"
_JOURNALS = "scoring"
_IDENTITY = "identity.json"


class _Part(BaseModel):
    part: str = "all"
    dense: Annotated[int, Field(gt=0)]
    stored: int


class _Ledger(_Part):
    rows: list[_Part]


class _Point(BaseModel):
    """What must be there of a point that was measured; of one that could not be, `reason` alone."""

    model_config = ConfigDict(strict=True)

    perplexity: Annotated[float, Field(gt=0)] | None
    reason: str | None = None
    protocol: str | None = None
    receivers: int = 0
    dropped: int = 0
    slim: int = 0
    units: int = 0
    parameters: int = 0
    bytes: int = 0
    attention_bytes: int = 0
    ledger: _Ledger | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        # Sweeps of before there were slim units go on.
        missing = [name for name in _Point.model_fields if name not in self.model_fields_set | {"slim"}]
        if missing and (self.perplexity is not None or "attention_bytes" in self.model_fields_set):
            raise ValueError(f"A point of this sweep lacks {missing[0]}; delete the folder's cache.")
        return self


class SweepFolder:
    """Points and scores of one sweep, kept as soon as they are there, each under the key of what they depend on.

    Args:
      path: the sweep's folder; made if it does not exist.
      identity: what every point depends on besides its method and ratio, by a name to tell the user; plain data.

    Raises:
      HeadshareError: the folder holds a sweep of another identity, none at all, or a damaged one.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.path = path
        # In the names of files, so that none of another sweep can be taken for one of this.
        self._key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        if not path.exists():
            with new_directory(path) as folder:
                storage.make_folder(folder / CACHE)
                (folder / CACHE / _IDENTITY).write_text(json.dumps(identity, indent=1), encoding="utf-8")
            return
        file = path / CACHE / _IDENTITY
        if not file.is_file():
            raise HeadshareError(f"{path} is not the folder of a sweep, so none can go on there; choose another name.")
        recover(file)
        there = read_json(file, remedy="delete it")
        other = [name for name in {**identity, **there} if identity.get(name) != there.get(name)]
        if other:
            raise HeadshareError(
                f"{path} holds a sweep with another {' and another '.join(other)} (their hashes differ), so this one "
                "cannot go on there; choose another folder."
            )

    def point(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured for a point, as plain data without infinities; measured and kept if it was not."""
        file = self._file(name, "json")
        if not file.is_file():
            # JSON has no infinities: they become null.
            point = json.loads(json.dumps(measure()), parse_constant=lambda _: None)
            with own_file(file) as path:
                path.write_text(json.dumps(point))
        there = read_json(file, remedy="delete it")
        with one_sentence(f"{file}, which may be deleted,"):
            _Point.model_validate(there)
        if there.get("map") is not None:
            there["map"] = json.loads(SharingMap.from_json(json.dumps(there["map"])).to_json())
        return there

    def scores(self, name: str, score: Callable[[], MatchResult]) -> MatchResult:
        """Scores, which serve every ratio; made and kept if they were not."""
        file = self._file(name, "npz")
        if not file.is_file():
            scores = score()
            with own_file(file) as path:
                scores_file.write(scores, path)
        return scores_file.read(file)

    def held(self) -> AbstractContextManager[None]:
        """Keeps other processes out of the folder until the block ends; TryAgain if one has it."""
        return held(self.path)

    @property
    def journals(self) -> JournalFolder:
        """Where scores are kept layer by layer, so that matching goes on after a stop."""
        return JournalFolder(self.path / CACHE / _JOURNALS)

    def write_results(self, record: dict[str, Any], scores: Sequence[MatchResult]) -> None:
        """Writes the finished sweep: `sweep.json`, `points.csv`, and the page.

        Args:
          record: of the sweep, as plain data.
          scores: to draw in the page.
        """
        with own_file(self.path / DATA) as path:
            path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        with own_file(self.path / TABLE) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(record["points"])
        with own_file(self.path / PAGE) as path:
            path.write_text(page(record, scores), encoding="utf-8")

    def _file(self, name: str, ending: str) -> Path:
        return self.path / CACHE / f"{name}-{self._key}.{ending}"
