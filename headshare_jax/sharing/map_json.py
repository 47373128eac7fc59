"""The JSON document of a sharing map: `text` writes it, `fields` reads and checks it."""

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from headshare_jax.errors import HeadshareError, one_sentence
from headshare_jax.sharing.tie import DROPPED, check_tie
from headshare_jax.sharing.widths import Widths, check_head

if TYPE_CHECKING:
    from headshare_jax.sharing.map import SharingMap

Tie = Annotated[str, AfterValidator(check_tie)]
Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Model(_Keys):
    num_layers: Count
    units_per_layer: Count
    heads_per_unit: Count
    # Of maps with slim units.
    head_dim: Count | None = None
    rotary_dim: Count | None = None


class _Dropped(_Keys):
    layer: Whole
    unit: Whole
    score: float | None = None


class _Receiver(_Dropped):
    donor: tuple[Whole, Whole]
    # Where there is none, it is the map's.
    tie: Tie = ""


class _Slim(_Dropped):
    # What is left out is kept whole.
    rank: Annotated[int, Field(ge=0, le=2**24)] | None = None
    pairs: list[int] | None = None


class _Document(_Keys):
    format: Literal["headshare-map"]
    # Version 1 had no slim units.
    version: Literal[1, 2]
    model: _Model
    tie: Tie
    method: str
    match: str | None = None
    chains: Literal["resolve", "forbid"]
    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    budget: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Whole | None = None
    source: str | None = None
    dropped: list[_Dropped] = []
    slim: list[_Slim] = []
    receivers: list[_Receiver]


_KNOWN = {*_Document.model_fields, *_Model.model_fields, *_Receiver.model_fields, *_Slim.model_fields}
_SETTINGS = ("tie", "method", "match", "chains", "ratio", "budget", "seed", "source")


def document(sharing: "SharingMap") -> str:
    """A map's document, with one receiver, dropped or slim unit a line."""
    num_layers, units = sharing.donor.shape
    model = {"num_layers": num_layers, "units_per_layer": units, "heads_per_unit": sharing.heads_per_unit}
    if sharing.widths is not None:
        model |= {"head_dim": sharing.widths.head_dim, "rotary_dim": sharing.widths.rotary_dim}
    settings = {name: getattr(sharing, name) for name in _SETTINGS if name != "budget" or sharing.budget is not None}
    # The least that holds the map: what a release before knew of is written as it wrote it.
    version = 1 if sharing.widths is None else 2
    head = {"format": "headshare-map", "version": version, "model": model, **settings}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    if sharing.dropped.any():
        lines.append(f'  "dropped": {_one_a_line(sharing, np.flatnonzero(sharing.dropped))},')
    if sharing.slim.any():
        lines.append(f'  "slim": {_one_a_line(sharing, np.flatnonzero(sharing.slim))},')
    lines.append(f'  "receivers": {_one_a_line(sharing, sharing.receivers)}')
    return "\n".join(["{", *lines, "}", ""])


def _one_a_line(sharing: "SharingMap", units: np.ndarray) -> str:
    lines = [f"    {json.dumps(_entry(sharing, int(flat)))}" for flat in units]
    return "[\n" + ",\n".join(lines) + "\n  ]" if lines else "[]"


def _entry(sharing: "SharingMap", flat: int) -> dict[str, Any]:
    assert sharing.unit_tie is not None
    layer, unit = divmod(flat, sharing.donor.shape[1])
    donor, tie, score = (array[layer, unit].item() for array in (sharing.donor, sharing.unit_tie, sharing.score))
    place = {"layer": layer, "unit": unit}
    shares = {} if donor in (DROPPED, flat) else {"donor": list(divmod(donor, sharing.donor.shape[1]))}
    own_tie = {} if tie in ("", sharing.tie) else {"tie": tie}
    return {**place, **shares, **own_tie, **_cut(sharing, layer, unit), "score": None if np.isnan(score) else score}


def _cut(sharing: "SharingMap", layer: int, unit: int) -> dict[str, Any]:
    """What is kept of a slim unit, of what is not kept whole."""
    widths = sharing.widths
    if widths is None:
        return {}
    rank, pairs = widths.rank[layer, unit], widths.pairs[layer, unit]
    said = {} if rank == widths.head_dim else {"rank": int(rank)}
    return said if pairs.all() else said | {"pairs": np.flatnonzero(pairs).tolist()}


def fields(text: str) -> dict[str, Any]:
    """What a document says, as the fields of a `SharingMap`.

    Raises:
      HeadshareError: not JSON, not such a document, unknown or repeated keys, values of other kinds, units out of
        range or named twice, a receiver that is its own donor, pairs out of range or twice.
    """
    with one_sentence("the map", _KNOWN):
        said = _Document.model_validate_json(text, strict=True)
    json.loads(text, object_pairs_hook=_once)
    shape = (said.model.num_layers, said.model.units_per_layer)
    if shape[0] * shape[1] * (said.model.head_dim or 1) > 2**24:
        of = "" if said.model.head_dim is None else f" with heads of {said.model.head_dim}"
        raise HeadshareError("The map claims {} layers of {} units{}, more than any model has.".format(*shape, of))
    donor = np.arange(shape[0] * shape[1]).reshape(shape)
    score, unit_tie = np.full(shape, np.nan), np.full(shape, "", "<U4")
    named: set[tuple[int, int]] = set()
    for entry in [*said.receivers, *said.dropped, *said.slim]:
        place = _place(entry.layer, entry.unit, shape)
        if place in named:
            raise HeadshareError("The map names unit {}.{} (layer.unit) twice.".format(*place))
        named.add(place)
        score[place] = np.nan if entry.score is None else entry.score
        if not isinstance(entry, _Slim):
            donor[place] = DROPPED
        if isinstance(entry, _Receiver):
            if place == _place(*entry.donor, shape):
                raise HeadshareError(
                    "The map makes unit {}.{} (layer.unit) its own donor; leave it out instead.".format(*place)
                )
            donor[place] = entry.donor[0] * shape[1] + entry.donor[1]
            unit_tie[place] = entry.tie or said.tie
    settings = {name: getattr(said, name) for name in _SETTINGS} | {"heads_per_unit": said.model.heads_per_unit}
    return {"donor": donor, "score": score, "unit_tie": unit_tie, "widths": _widths(said), **settings}


def _widths(said: _Document) -> Widths | None:
    if not said.slim:
        return None
    if said.version == 1:
        raise HeadshareError('slim in the map has no place in one of version 1; set "version" to 2.')
    head_dim, rotary_dim = said.model.head_dim, said.model.rotary_dim
    if head_dim is None or rotary_dim is None:
        raise HeadshareError("The map has slim units; its model needs head_dim and rotary_dim too.")
    shape = (said.model.num_layers, said.model.units_per_layer)
    pairs = np.ones((*shape, check_head(head_dim, rotary_dim)), bool)
    rank = np.full(shape, head_dim)
    for entry in said.slim:
        place = (entry.layer, entry.unit)
        if entry.rank is not None:
            rank[place] = entry.rank
        if entry.pairs is not None:
            _check_pairs(entry.pairs, pairs.shape[2], place)
            pairs[place] = np.isin(np.arange(pairs.shape[2]), entry.pairs)
        if rank[place] == head_dim and pairs[place].all():
            raise HeadshareError("The map cuts nothing of slim unit {}.{} (layer.unit); leave it out.".format(*place))
    return Widths(rank, pairs, head_dim)


def _check_pairs(kept: list[int], count: int, place: tuple[int, int]) -> None:
    for pair, times in Counter(kept).items():
        if not 0 <= pair < count:
            raise HeadshareError(
                "The map keeps pair {} of unit {}.{} (layer.unit), but its heads have pairs 0 to {}.".format(
                    pair, *place, count - 1
                )
            )
        if times > 1:
            raise HeadshareError("The map names pair {} of unit {}.{} (layer.unit) twice.".format(pair, *place))


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Refuses an object of JSON with a key that stands in it twice; readers would differ in which they take."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise HeadshareError(f"The map has the key {key} twice in one place.")


def _place(layer: int, unit: int, shape: tuple[int, int]) -> tuple[int, int]:
    if layer >= shape[0] or unit >= shape[1]:
        raise HeadshareError(
            f"The map names unit {layer}.{unit} (layer.unit), but its model has {shape[0]} layers of {shape[1]} units."
        )
    return layer, unit
