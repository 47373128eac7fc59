"""The JSON document of a sharing map: `text` writes it, `fields` reads and checks it."""

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from headshare_jax.errors import HeadshareError, one_sentence
from headshare_jax.sharing.tie import DROPPED, check_tie

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


class _Dropped(_Keys):
    layer: Whole
    unit: Whole
    score: float | None = None


class _Receiver(_Dropped):
    donor: tuple[Whole, Whole]
    # Where there is none, it is the map's.
    tie: Tie = ""


class _Document(_Keys):
    format: Literal["headshare-map"]
    version: Literal[1]
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
    receivers: list[_Receiver]


_KNOWN = {*_Document.model_fields, *_Model.model_fields, *_Receiver.model_fields}
_SETTINGS = ("tie", "method", "match", "chains", "ratio", "budget", "seed", "source")


def document(sharing: "SharingMap") -> str:
    """A map's document, with one receiver or dropped unit a line."""
    num_layers, units = sharing.donor.shape
    model = {"num_layers": num_layers, "units_per_layer": units, "heads_per_unit": sharing.heads_per_unit}
    settings = {name: getattr(sharing, name) for name in _SETTINGS if name != "budget" or sharing.budget is not None}
    head = {"format": "headshare-map", "version": 1, "model": model, **settings}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    if sharing.dropped.any():
        lines.append(f'  "dropped": {_one_a_line(sharing, np.flatnonzero(sharing.dropped))},')
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
    shares = {} if donor == DROPPED else {"donor": list(divmod(donor, sharing.donor.shape[1]))}
    own_tie = {} if tie in ("", sharing.tie) else {"tie": tie}
    return {**place, **shares, **own_tie, "score": None if np.isnan(score) else score}


def fields(text: str) -> dict[str, Any]:
    """What a document says, as the fields of a `SharingMap`.

    Raises:
      HeadshareError: not JSON, not such a document, unknown or repeated keys, values of other kinds, units out of
        range or named twice, a receiver that is its own donor.
    """
    with one_sentence("the map", _KNOWN):
        said = _Document.model_validate_json(text, strict=True)
    json.loads(text, object_pairs_hook=_once)
    shape = (said.model.num_layers, said.model.units_per_layer)
    if shape[0] * shape[1] > 2**24:
        raise HeadshareError("The map claims {} layers of {} units, more than any model has.".format(*shape))
    donor = np.arange(shape[0] * shape[1]).reshape(shape)
    score, unit_tie = np.full(shape, np.nan), np.full(shape, "", "<U4")
    named: set[tuple[int, int]] = set()
    for entry in [*said.receivers, *said.dropped]:
        place = _place(entry.layer, entry.unit, shape)
        if place in named:
            raise HeadshareError("The map names unit {}.{} (layer.unit) twice.".format(*place))
        named.add(place)
        score[place] = np.nan if entry.score is None else entry.score
        donor[place] = DROPPED
        if isinstance(entry, _Receiver):
            if place == _place(*entry.donor, shape):
                raise HeadshareError(
                    "The map makes unit {}.{} (layer.unit) its own donor; leave it out instead.".format(*place)
                )
            donor[place] = entry.donor[0] * shape[1] + entry.donor[1]
            unit_tie[place] = entry.tie or said.tie
    settings = {name: getattr(said, name) for name in _SETTINGS} | {"heads_per_unit": said.model.heads_per_unit}
    return {"donor": donor, "score": score, "unit_tie": unit_tie, **settings}


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
