"""The JSON document of a sharing map, and the words that maps use: the name of a tie, and what stands for no donor."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PROJECTIONS

if TYPE_CHECKING:
    from headshare_jax.sharing.map import SharingMap

FORMAT, VERSION = "headshare-map", 1
# In place of a donor: the unit is dropped, its output is zero, and nothing of it is stored.
DROPPED = -1


def check_tie(tie: str) -> str:
    """The tie itself; raises HeadshareError unless it is a non-empty subset of `qkvo` in that order."""
    if not tie or tie != "".join(projection for projection in PROJECTIONS if projection in tie):
        raise HeadshareError(f"The tie must name some of q, k, v, o in that order (such as qkv or qk), not {tie!r}.")
    return tie


def document(sharing: "SharingMap") -> str:
    """A map's document, with one receiver or dropped unit a line."""
    num_layers, units = sharing.donor.shape
    head = {
        "format": FORMAT,
        "version": VERSION,
        "model": {"num_layers": num_layers, "units_per_layer": units, "heads_per_unit": sharing.heads_per_unit},
        "tie": sharing.tie,
        "method": sharing.method,
        "match": sharing.match,
        "chains": sharing.chains,
        "ratio": sharing.ratio,
        **({} if sharing.budget is None else {"budget": sharing.budget}),
        "seed": sharing.seed,
        "source": sharing.source,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    if sharing.dropped.any():
        dropped = (_place(sharing, int(flat)) for flat in np.flatnonzero(sharing.dropped))
        lines.append(f'  "dropped": {_one_a_line(dropped)},')
    receivers = (_receiver(sharing, int(flat)) for flat in sharing.receivers)
    lines.append(f'  "receivers": {_one_a_line(receivers)}')
    return "\n".join(["{", *lines, "}", ""])


def _receiver(sharing: "SharingMap", flat: int) -> dict[str, Any]:
    assert sharing.unit_tie is not None
    place, tie = _place(sharing, flat), str(sharing.unit_tie.flat[flat])
    donor = list(divmod(int(sharing.donor.flat[flat]), sharing.donor.shape[1]))
    score = {"score": place.pop("score")}
    return place | {"donor": donor} | ({} if tie == sharing.tie else {"tie": tie}) | score


def _place(sharing: "SharingMap", flat: int) -> dict[str, Any]:
    layer, unit = divmod(flat, sharing.donor.shape[1])
    score = float(sharing.score.flat[flat])
    return {"layer": layer, "unit": unit, "score": None if np.isnan(score) else score}


def _one_a_line(entries: Iterable[dict[str, Any]]) -> str:
    lines = [f"    {json.dumps(entry)}" for entry in entries]
    return "[\n" + ",\n".join(lines) + "\n  ]" if lines else "[]"


def fields(text: str) -> dict[str, Any]:
    """What a document says, as the fields of a `SharingMap`.

    Raises:
      HeadshareError: not JSON, not such a document, values of other kinds, units out of range or named twice, a
        receiver that is its own donor.
    """
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeadshareError(
            f"The map is not valid JSON ({error}); give one that was saved by this program."
        ) from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise HeadshareError(f'The map is not a {FORMAT} document (its "format" says otherwise).')
    if said.get("version") != VERSION:
        raise HeadshareError(f"The map has version {said.get('version')!r}; this release reads {VERSION}.")
    try:
        return _fields(said)
    except KeyError as error:
        raise HeadshareError(f"The map lacks the field {error}.") from error


def _fields(document: Mapping[str, Any]) -> dict[str, Any]:
    model = _object(document["model"], "model")
    num_layers, units = (_whole(model[name], name, 1) for name in ("num_layers", "units_per_layer"))
    if num_layers * units > 2**24:
        raise HeadshareError(f"The map claims {num_layers} layers of {units} units, more than any model has.")
    donor = np.arange(num_layers * units).reshape(num_layers, units)
    score = np.full(donor.shape, np.nan)
    tie = check_tie(_text(document["tie"], "tie"))
    unit_tie = np.full(donor.shape, "", "<U4")
    named = np.zeros(donor.shape, bool)

    def name(entry: Mapping[str, Any]) -> tuple[int, int]:
        place = _unit(entry["layer"], entry["unit"], donor.shape)
        if named[place]:
            raise HeadshareError(f"The map names unit {place[0]}.{place[1]} (layer.unit) twice.")
        named[place] = True
        if entry.get("score") is not None:
            score[place] = _number(entry["score"], "score")
        return place

    for entry in _objects(document["receivers"], "receivers"):
        place = name(entry)
        donor_layer, donor_unit = _unit(*_pair(entry["donor"], "donor"), donor.shape)
        if place == (donor_layer, donor_unit):
            raise HeadshareError(
                f"The map makes unit {place[0]}.{place[1]} (layer.unit) its own donor; leave it out instead."
            )
        donor[place] = donor_layer * units + donor_unit
        unit_tie[place] = check_tie(_text(entry.get("tie", tie), "tie"))
    for entry in _objects(document.get("dropped", []), "dropped"):
        donor[name(entry)] = DROPPED
    match, ratio, budget, seed, source = (document.get(name) for name in ("match", "ratio", "budget", "seed", "source"))
    return {
        "donor": donor,
        "score": score,
        "heads_per_unit": _whole(model["heads_per_unit"], "heads_per_unit", 1),
        "tie": tie,
        "unit_tie": unit_tie,
        "method": _text(document["method"], "method"),
        "chains": _text(document["chains"], "chains"),
        "match": None if match is None else _text(match, "match"),
        "ratio": None if ratio is None else _fraction(ratio, "ratio"),
        "budget": None if budget is None else _fraction(budget, "budget", inclusive=True),
        "seed": None if seed is None else _whole(seed, "seed", 0),
        "source": None if source is None else _text(source, "source"),
    }


def _unit(layer: Any, unit: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    layer, unit = _whole(layer, "layer", 0), _whole(unit, "unit", 0)
    if layer >= shape[0] or unit >= shape[1]:
        raise HeadshareError(
            f"The map names unit {layer}.{unit} (layer.unit), but its model has {shape[0]} layers of {shape[1]} units."
        )
    return layer, unit


def _whole(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise HeadshareError(f"{name} in the map must be a whole number of at least {least}, not {value!r}.")
    return value


def _number(value: Any, name: str) -> float:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not whole and not isinstance(value, float):
        raise HeadshareError(f"{name} in the map must be a number, not {value!r}.")
    return float(value)


def _fraction(value: Any, name: str, *, inclusive: bool = False) -> float:
    number = _number(value, name)
    if not (0 <= number < 1 or (inclusive and number == 1)):
        end = "at most 1" if inclusive else "below 1"
        raise HeadshareError(f"{name} in the map must be a number of at least 0 and {end}, not {value!r}.")
    return number


def _pair(value: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise HeadshareError(f"{name} in the map must be [layer, unit], not {value!r}.")
    return value[0], value[1]


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise HeadshareError(f"{name} in the map must be an object, not {value!r}.")
    return value


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise HeadshareError(f"{name} in the map must be a list, not {value!r}.")
    return [_object(entry, f"an entry of {name}") for entry in value]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise HeadshareError(f"{name} in the map must be text, not {value!r}.")
    return value
