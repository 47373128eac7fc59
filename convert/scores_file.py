"""Match results on disk, whole."""

import json
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.scores import MatchResult

_ARRAYS = ("donor_layer", "donor_unit", "value", "scores", "drop_score")
# Before the name of a tie.
_TIE = "scores_"
_SETTINGS = ("match", "heads_per_unit", "seed", "source")


def write(result: MatchResult, path: Path) -> None:
    """Writes every field of a match result as .npz."""
    arrays = {name: getattr(result, name) for name in _ARRAYS if getattr(result, name) is not None}
    arrays |= {_TIE + tie: scores for tie, scores in result.tie_scores.items()}
    settings = json.dumps({name: getattr(result, name) for name in _SETTINGS})
    with path.open("wb") as file:
        np.savez(file, settings=np.array(settings), **arrays)


def read(path: Path) -> MatchResult:
    """Reads what `write` wrote; HeadshareError if it is not that."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _ARRAYS if name in stored}
            ties = {name.removeprefix(_TIE): stored[name] for name in stored if name.startswith(_TIE)}
            return MatchResult(**arrays, tie_scores=ties, **json.loads(str(stored["settings"])))
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise HeadshareError(f"The scores in {path} cannot be read ({error}); delete the file.") from error
