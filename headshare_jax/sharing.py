"""Sharing maps: who shares whose weights, and the JSON document that says so."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError

PROJECTIONS = ("q", "k", "v", "o")
FORMAT, VERSION = "headshare-map", 1


@dataclass(frozen=True, eq=False)
class SharingMap:
    """For every sharing unit, the unit whose weights it uses.

    Attributes:
      donor: int32 [L, U], flat index (layer * U + unit) of the root donor; a unit's own index where it keeps its
        weights.
      score: float64 [L, U], the match score by which a receiver was chosen; NaN elsewhere.
      heads_per_unit: G, query heads in a unit.
      tie: projections that are shared, a non-empty subset of `qkvo` in that order.
      method: how donors were found, e.g. `direct`.
      match: match function.
      chains: `resolve` or `forbid`.
      ratio: the sharing ratio that was asked for.
      seed: of the random baseline.
      source: fingerprint of the attention weights the map was made for, or None if unknown.

    Raises:
      HeadshareError: the donors are out of range, or form a chain or a cycle; the tie is not a subset of `qkvo`.
    """

    donor: np.ndarray
    score: np.ndarray
    heads_per_unit: int
    tie: str = "qkv"
    method: str = "direct"
    match: str | None = None
    chains: str = "resolve"
    ratio: float | None = None
    seed: int | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "donor", _frozen(np.asarray(self.donor, np.int32)))
        object.__setattr__(self, "score", _frozen(np.asarray(self.score, np.float64)))
        check_tie(self.tie)
        if self.donor.ndim != 2 or self.donor.shape != self.score.shape:
            raise HeadshareError("A sharing map needs donors and scores of the same shape [layers, units].")
        _check_donors(self.donor)

    @property
    def receives(self) -> np.ndarray:
        """bool [L, U]: the unit uses another unit's weights."""
        return self.donor != np.arange(self.donor.size).reshape(self.donor.shape)

    @property
    def receivers(self) -> np.ndarray:
        """int64 [receivers], flat indices of the receivers in ascending order."""
        return np.flatnonzero(self.receives)

    def slot_donor(self, projection: str) -> np.ndarray:
        """Flat head slot whose weights each head uses, int64 [L, N] for q and o, [L, K] for k and v."""
        num_layers, units = self.donor.shape
        group = self.heads_per_unit if projection in "qo" else 1
        unit_lu = self.donor if projection in self.tie else np.arange(self.donor.size).reshape(self.donor.shape)
        slot_lug = unit_lu[:, :, None].astype(np.int64) * group + np.arange(group)
        return slot_lug.reshape(num_layers, units * group)

    def owns_weights(self, projection: str) -> np.ndarray:
        """bool, shaped like `slot_donor`: the head's own weights are stored."""
        slot = self.slot_donor(projection)
        return slot == np.arange(slot.size).reshape(slot.shape)

    def stored_slots(self, projection: str) -> np.ndarray:
        """int64 [P], the flat head slot that each pool row holds, ascending."""
        return np.flatnonzero(self.owns_weights(projection))

    def pool_index(self, projection: str) -> np.ndarray:
        """Pool row of every head, int32, shaped like `slot_donor`."""
        return np.searchsorted(self.stored_slots(projection), self.slot_donor(projection)).astype(np.int32)

    def check_model(self, config: LlamaConfig) -> None:
        """Raises HeadshareError unless the map has the shape of this model."""
        mine = (*self.donor.shape, self.heads_per_unit)
        theirs = (config.num_layers, config.num_kv_heads, config.heads_per_unit)
        if mine != theirs:
            raise HeadshareError(
                "The map is for another model: it has {} layers of {} units with {} query heads each, "
                "the model {} layers of {} units with {}.".format(*mine, *theirs)
            )

    def to_json(self) -> str:
        """The map as a JSON document with one receiver a line, so that edits and diffs are easy to read."""
        num_layers, units = self.donor.shape
        head = {
            "format": FORMAT,
            "version": VERSION,
            "model": {"num_layers": num_layers, "units_per_layer": units, "heads_per_unit": self.heads_per_unit},
            "tie": self.tie,
            "method": self.method,
            "match": self.match,
            "chains": self.chains,
            "ratio": self.ratio,
            "seed": self.seed,
            "source": self.source,
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        receivers = [f"    {json.dumps(self._receiver(flat))}" for flat in self.receivers]
        body = "[\n" + ",\n".join(receivers) + "\n  ]" if receivers else "[]"
        return "\n".join(["{", *lines, f'  "receivers": {body}', "}", ""])

    def _receiver(self, flat: int) -> dict[str, Any]:
        units = self.donor.shape[1]
        donor, score = int(self.donor.flat[flat]), float(self.score.flat[flat])
        return {
            "layer": int(flat) // units,
            "unit": int(flat) % units,
            "donor": [donor // units, donor % units],
            "score": None if np.isnan(score) else score,
        }

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `to_json`'s document, edited by hand or not.

        Raises:
          HeadshareError: not JSON, not such a document, or a map that cannot be: units out of range or named twice,
            a receiver that is its own donor, a chain or a cycle.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise HeadshareError(f"The map is not valid JSON: {error}.") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise HeadshareError(f'The map is not a {FORMAT} document (its "format" says otherwise).')
        if document.get("version") != VERSION:
            raise HeadshareError(f"The map has version {document.get('version')!r}; this release reads {VERSION}.")
        try:
            return cls(**_map_fields(document))
        except KeyError as error:
            raise HeadshareError(f"The map lacks the field {error}.") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise HeadshareError(f"The map has a malformed field: {error}.") from error

    def _key(self) -> tuple[Any, ...]:
        settings = (self.heads_per_unit, self.tie, self.method, self.match, self.chains, self.ratio, self.seed)
        return (self.donor.shape, self.donor.tobytes(), self.score.tobytes(), self.source, *settings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharingMap) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def check_tie(tie: str) -> str:
    """The tie itself; raises HeadshareError unless it is a non-empty subset of `qkvo` in that order."""
    if not tie or tie != "".join(projection for projection in PROJECTIONS if projection in tie):
        raise HeadshareError(f"The tie must name some of q, k, v, o in that order (such as qkv or qk), not {tie!r}.")
    return tie


def _check_donors(donor: np.ndarray) -> None:
    flat, units = donor.ravel(), donor.shape[1]

    def label(unit: int) -> str:
        return f"{unit // units}.{unit % units}"

    outside = np.flatnonzero((flat < 0) | (flat >= flat.size))
    if outside.size:
        raise HeadshareError(f"Unit {label(outside[0])} of the map has a donor outside the model.")
    for unit in np.flatnonzero(flat[flat] != flat):
        seen = [int(unit)]
        while flat[seen[-1]] != seen[-1]:
            seen.append(int(flat[seen[-1]]))
            if seen[-1] in seen[:-1]:
                raise HeadshareError(f"The map has a cycle: {' -> '.join(map(label, seen))} (layer.unit).")
        raise HeadshareError(
            f"The map has a chain: {' -> '.join(map(label, seen))} (layer.unit); "
            f"name the root {label(seen[-1])} as the donor of {label(seen[0])}."
        )


def _map_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    model = document["model"]
    num_layers, units = (_whole(model[name], name, 1) for name in ("num_layers", "units_per_layer"))
    if num_layers * units > 2**24:
        raise HeadshareError(f"The map claims {num_layers} layers of {units} units, more than any model has.")
    donor = np.arange(num_layers * units).reshape(num_layers, units)
    score = np.full(donor.shape, np.nan)
    named = np.zeros(donor.shape, bool)
    for entry in document["receivers"]:
        layer, unit = _unit(entry["layer"], entry["unit"], donor.shape)
        to_layer, to_unit = entry["donor"]
        donor_layer, donor_unit = _unit(to_layer, to_unit, donor.shape)
        if named[layer, unit]:
            raise HeadshareError(f"The map names receiver {layer}.{unit} (layer.unit) twice.")
        if (layer, unit) == (donor_layer, donor_unit):
            raise HeadshareError(f"The map makes unit {layer}.{unit} (layer.unit) its own donor; leave it out instead.")
        named[layer, unit] = True
        donor[layer, unit] = donor_layer * units + donor_unit
        if entry.get("score") is not None:
            score[layer, unit] = float(entry["score"])
    match, ratio, seed, source = (document.get(name) for name in ("match", "ratio", "seed", "source"))
    return {
        "donor": donor,
        "score": score,
        "heads_per_unit": _whole(model["heads_per_unit"], "heads_per_unit", 1),
        "tie": check_tie(_text(document["tie"], "tie")),
        "method": _text(document["method"], "method"),
        "chains": _text(document["chains"], "chains"),
        "match": None if match is None else _text(match, "match"),
        "ratio": None if ratio is None else _fraction(ratio, "ratio"),
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


def _fraction(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise HeadshareError(f"{name} in the map must be a number of at least 0 and below 1, not {value!r}.")
    return float(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise HeadshareError(f"{name} in the map must be text, not {value!r}.")
    return value


def _frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array
