"""Match results on disk, whole."""

import json
import math
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.scores import MatchResult

_ARRAYS = ("donor_layer", "donor_unit", "value", "scores", "drop_score")
# Before the name of a tie.
_TIE = "scores_"


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    match: str | None
    heads_per_unit: int
    seed: int | None
    source: str | None


def write(result: MatchResult, path: Path) -> None:
    """Writes every field of a match result as .npz."""
    arrays = {name: getattr(result, name) for name in _ARRAYS if getattr(result, name) is not None}
    arrays |= {_TIE + tie: scores for tie, scores in result.tie_scores.items()}
    settings = json.dumps({name: getattr(result, name) for name in _Settings.model_fields})
    with path.open("wb") as file:
        np.savez(file, settings=np.array(settings), **arrays)


def read(path: Path) -> MatchResult:
    """Reads what `write` wrote; HeadshareError if it is not that."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _ARRAYS if name in stored}
            ties = {name.removeprefix(_TIE): stored[name] for name in stored if name.startswith(_TIE)}
            settings = _Settings.model_validate_json(str(stored["settings"])).model_dump()
        result = MatchResult(**arrays, tie_scores=ties, **settings)
        _check(result)
    except Exception as error:  # NumPy and zipfile let a damaged file show itself in any way
        said = " ".join(str(error).split())
        raise HeadshareError(f"The scores in {path} cannot be read ({said:.200}); delete the file.") from error
    return result


def _check(result: MatchResult) -> None:
    """Raises ValueError unless shapes and types are a match result's."""
    units = result.value.shape
    pairs = (math.prod(units), math.prod(units))
    wanted: list[tuple[np.ndarray | None, tuple[int, ...], type]] = [
        (result.value, units, np.floating),
        (result.donor_layer, units, np.integer),
        (result.donor_unit, units, np.integer),
        (result.drop_score, units, np.floating),
        *((scores, pairs, np.floating) for scores in (result.scores, *result.tie_scores.values())),
    ]
    for array, shape, kind in wanted:
        if array is not None and (array.ndim != 2 or array.shape != shape or not np.issubdtype(array.dtype, kind)):
            raise ValueError(f"an array is {array.dtype} {list(array.shape)}")
    for places, count in zip((result.donor_layer, result.donor_unit), units, strict=True):
        if not ((places >= -1) & (places < count)).all():
            raise ValueError("a donor is none of the units")
