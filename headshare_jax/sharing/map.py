"""Sharing maps: who shares whose weights, who is dropped, and who is slim."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PROJECTIONS
from headshare_jax.sharing import map_json
from headshare_jax.sharing.tie import DROPPED, check_tie
from headshare_jax.sharing.widths import Widths

__all__ = ["DROPPED", "SharingMap", "check_tie", "shard_of_units"]


@dataclass(frozen=True, eq=False)
class SharingMap:
    """For every sharing unit, the unit whose weights it uses, or that it is dropped, or what is kept of it.

    Attributes:
      donor: int32 [L, U], flat index (layer * U + unit) of the root donor; a unit's own index where it keeps its
        weights, `DROPPED` where it is dropped.
      score: float64 [L, U], the score by which a receiver or a dropped unit was chosen, of a slim unit minus what its
        cut costs; NaN elsewhere.
      heads_per_unit: G, query heads in a unit.
      tie: projections that receivers share, a non-empty subset of `qkvo` in that order.
      unit_tie: str [L, U], what each receiver shares, empty for other units; `tie` for every receiver unless given.
      method: how donors were found, e.g. `direct`.
      match: match function.
      chains: `resolve` or `forbid`.
      ratio: the sharing ratio that was asked for.
      budget: the part of the attention parameters that was to be kept.
      seed: of the random baseline.
      source: fingerprint of the attention weights the map was made for, or None if unknown.
      widths: what is kept of each unit; None where nothing of any is cut.

    Raises:
      HeadshareError: the donors are no integers, out of range, dropped, or form a chain or a cycle; no unit keeps its
        weights; a tie is not a subset of `qkvo`; `heads_per_unit` is below 1; the widths are those of other units, or
        a unit that receives, is a donor or is dropped has some of it cut.
    """

    donor: np.ndarray
    score: np.ndarray
    heads_per_unit: int
    tie: str = "qkv"
    unit_tie: np.ndarray | None = None
    method: str = "direct"
    match: str | None = None
    chains: str = "resolve"
    ratio: float | None = None
    budget: float | None = None
    seed: int | None = None
    source: str | None = None
    widths: Widths | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "donor", _frozen(_whole(self.donor)))
        object.__setattr__(self, "score", _frozen(np.asarray(self.score, np.float64)))
        check_tie(self.tie)
        heads = self.heads_per_unit
        if not isinstance(heads, (int, np.integer)) or isinstance(heads, bool) or heads < 1:
            raise HeadshareError(f"heads_per_unit of a map must be a whole number of at least 1, not {heads!r:.99}.")
        if self.donor.ndim != 2 or self.donor.shape != self.score.shape:
            raise HeadshareError("A sharing map needs donors and scores of the same shape [layers, units].")
        _check_donors(self.donor)
        ties = np.where(self.receives, self.tie, "") if self.unit_tie is None else np.asarray(self.unit_tie, str)
        if ties.shape != self.donor.shape or not np.array_equal(ties != "", self.receives):
            raise HeadshareError("A sharing map needs a tie for every receiver, and for no other unit.")
        for tie in np.unique(ties[self.receives]):
            check_tie(str(tie))
        object.__setattr__(self, "unit_tie", _frozen(ties))
        if self.widths is not None:
            self._check_widths(self.widths)
            object.__setattr__(self, "widths", self.widths if self.widths.slim.any() else None)

    def _check_widths(self, widths: Widths) -> None:
        if widths.rank.shape != self.donor.shape:
            raise HeadshareError("The widths of a map must have its shape [layers, units].")
        donates = np.zeros(self.donor.size, bool)
        donates[self.donor.flat[self.receivers]] = True
        kinds = {
            "is dropped": self.dropped,
            "uses another unit's weights": self.receives,
            "is another unit's donor": donates.reshape(self.donor.shape),
        }
        for what, units in kinds.items():
            for layer, unit in np.argwhere(widths.slim & units):
                raise HeadshareError(
                    f"The map makes unit {layer}.{unit} (layer.unit) slim, which {what}; only a unit that keeps its "
                    "weights for itself can be slim: leave its widths out, or the other."
                )

    @property
    def receives(self) -> np.ndarray:
        """bool [L, U]: the unit uses another unit's weights."""
        return (self.donor != _identity(self.donor)) & ~self.dropped

    @property
    def dropped(self) -> np.ndarray:
        """bool [L, U]: the unit is dropped."""
        return self.donor == DROPPED

    @property
    def slim(self) -> np.ndarray:
        """bool [L, U]: some columns of the unit's heads are cut."""
        return np.zeros(self.donor.shape, bool) if self.widths is None else self.widths.slim

    @property
    def receivers(self) -> np.ndarray:
        """int64 [receivers], flat indices of the receivers in ascending order."""
        return np.flatnonzero(self.receives)

    def tied(self, projection: str) -> np.ndarray:
        """bool [L, U]: the unit uses its donor's weights of this projection."""
        assert self.unit_tie is not None
        return np.strings.find(self.unit_tie, projection) >= 0

    @property
    def pooled(self) -> str:
        """Projections of which some unit does not store its own weights, in the order q, k, v, o."""
        return "".join(projection for projection in PROJECTIONS if not self.owns_weights(projection).all())

    @property
    def slots_per_head(self) -> int:
        """Pool rows that a whole head takes: 1, or H where some unit is slim; pools then hold columns of heads."""
        return 1 if self.widths is None else self.widths.head_dim

    def kept_columns(self, projection: str) -> np.ndarray:
        """bool [L, N, H] for q and o, [L, K, H] for k and v: columns of heads that a map with widths does not cut."""
        assert self.widths is not None
        return np.repeat(self.widths.kept(projection), self.heads_per_unit if projection in "qo" else 1, axis=1)

    def head_donor(self, projection: str) -> np.ndarray:
        """Flat head whose weights each head uses, int64 [L, N] for q and o, [L, K] for k and v; -1: dropped."""
        num_layers, units = self.donor.shape
        group = self.heads_per_unit if projection in "qo" else 1
        unit_lu = np.where(self.tied(projection), self.donor, _identity(self.donor)).astype(np.int64)
        head_lug = np.where(self.dropped[:, :, None], DROPPED, unit_lu[:, :, None] * group + np.arange(group))
        return head_lug.reshape(num_layers, units * group)

    def slot_donor(self, projection: str) -> np.ndarray:
        """Flat slot whose weights each slot uses, int64 [L, N] for q and o, [L, K] for k and v; -1: dropped.

        Slots are heads; in a map with widths columns of heads, [L, N * H] or [L, K * H], and -1 is also what is cut.
        """
        return self._layouts[projection].donor

    def owns_weights(self, projection: str) -> np.ndarray:
        """bool, shaped like `slot_donor`: the slot's own weights are stored."""
        slot = self.slot_donor(projection)
        return slot == _identity(slot)

    def stored_slots(self, projection: str) -> np.ndarray:
        """int64 [P], the flat slot that each pool row holds, ascending."""
        return self._layouts[projection].stored

    def pool_index(self, projection: str) -> np.ndarray:
        """Pool row of every slot, int32, shaped like `slot_donor`; P, one past the last row, for what is not stored."""
        return self._layouts[projection].index

    @cached_property
    def _layouts(self) -> dict[str, "_Layout"]:
        """By projection; every slice that is read asks for them."""
        return {projection: self._layout(projection) for projection in PROJECTIONS}

    def _layout(self, projection: str) -> "_Layout":
        donor = self.head_donor(projection)
        if self.widths is not None:
            column_lnh = donor[:, :, None] * self.slots_per_head + np.arange(self.slots_per_head)
            kept_lnh = self.kept_columns(projection) & (donor != DROPPED)[:, :, None]
            donor = np.where(kept_lnh, column_lnh, DROPPED).reshape(len(donor), -1)
        stored = np.flatnonzero(donor == _identity(donor))
        index = np.where(donor == DROPPED, len(stored), np.searchsorted(stored, donor)).astype(np.int32)
        return _Layout(_frozen(donor), _frozen(stored), _frozen(index))

    def crossing(self, shards: int) -> np.ndarray:
        """bool [L, U]: the receiver's donor lies in another shard, where each layer's units are cut into `shards`.

        Raises:
          HeadshareError: the shards do not divide a layer's units.
        """
        shard_u = shard_of_units(self.donor.shape[1], shards)
        donor_shard_lu = shard_u[np.where(self.receives, self.donor, 0) % len(shard_u)]
        return self.receives & (donor_shard_lu != shard_u[None, :])

    def check_model(self, config: LlamaConfig) -> None:
        """Raises HeadshareError unless the map has the shape of this model, and the model can have its widths."""
        mine = (*self.donor.shape, self.heads_per_unit)
        theirs = (config.num_layers, config.num_kv_heads, config.heads_per_unit)
        if mine != theirs:
            raise HeadshareError(
                "The map is for another model: it has {} layers of {} units with {} query heads each, "
                "the model {} layers of {} units with {}.".format(*mine, *theirs)
            )
        if self.widths is None:
            return
        heads = (self.widths.head_dim, self.widths.rotary_dim), (config.head_dim, config.rotary_dim)
        if heads[0] != heads[1]:
            raise HeadshareError(
                "The map is for another model: its heads have {} columns, {} of which turn, the model's {}, of which "
                "{} turn.".format(*heads[0], *heads[1])
            )
        if config.qk_norm and not self.widths.pairs.all():
            layer, unit = np.argwhere(~self.widths.pairs.all(axis=2))[0]
            raise HeadshareError(
                f"The map cuts pairs of q and k of unit {layer}.{unit} (layer.unit), but this model has norms on its q "
                "and k heads, which a cut would change; keep all pairs, and cut values alone."
            )

    def summary(self) -> str:
        """What the map does, e.g. `2 of 6 units use another unit's qkv or qo weights, 3 are dropped`.

        Of a map with slim units, also how many columns its units keep that have weights of their own.
        """
        assert self.unit_tie is not None
        ties = " or ".join(np.unique(self.unit_tie[self.receives])) or self.tie
        counts = {"dropped": int(self.dropped.sum()), "slim": int(self.slim.sum())}
        does = [(count, f"{'is' if count == 1 else 'are'} {what}") for what, count in counts.items() if count]
        if self.receives.any() or not does:
            does.insert(0, (len(self.receivers), f"use another unit's {ties} weights"))
        (first, what), *others = does
        told = ", ".join([f"{first} of {self.donor.size} units {what}", *(f"{count} {what}" for count, what in others)])
        if self.widths is None or not counts["slim"]:
            return told
        own_lu, size = ~self.dropped & ~self.receives, self.widths.head_dim
        values, pairs = (_range(kept.sum(axis=2)[own_lu]) for kept in (self.widths.vo, self.widths.qk))
        return f"{told}; values {values} of {size}, queries and keys {pairs}"

    def to_json(self) -> str:
        """The map as a JSON document with one unit a line, so that edits and diffs are readable."""
        return map_json.document(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `to_json`'s document, edited by hand or not.

        Raises:
          HeadshareError: not JSON, not such a document, or a map that cannot be: units out of range or named twice,
            a receiver that is its own donor, a dropped donor, a chain or cycle, every unit dropped, impossible widths.

        Examples:
          >>> hs.SharingMap.from_json(sharing.to_json()) == sharing
          True
        """
        return cls(**map_json.fields(text))

    def _key(self) -> tuple[Any, ...]:
        assert self.unit_tie is not None
        arrays = (self.donor.tobytes(), self.score.tobytes(), tuple(self.unit_tie.flat))
        settings = (self.heads_per_unit, self.tie, self.method, self.match, self.chains, self.source)
        return (self.donor.shape, *arrays, *settings, self.ratio, self.budget, self.seed, self.widths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharingMap) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True, eq=False)
class _Layout:
    """How a projection is stored: `SharingMap.slot_donor`, `stored_slots` and `pool_index`."""

    donor: np.ndarray
    stored: np.ndarray
    index: np.ndarray


def _whole(donor: np.ndarray) -> np.ndarray:
    """Donors as int32; neither a fraction nor a number beyond int32 becomes another unit."""
    donor = np.asarray(donor)
    whole = donor.astype(np.int32)
    if donor.dtype.kind not in "iu" or not np.array_equal(whole, donor):
        raise HeadshareError("The donors of a map must be whole numbers, each the index of a unit or -1.")
    return whole


def _check_donors(donor: np.ndarray) -> None:
    flat, units = donor.ravel(), donor.shape[1]

    def label(unit: int) -> str:
        return f"{unit // units}.{unit % units}"

    outside = np.flatnonzero((flat < DROPPED) | (flat >= flat.size))
    if outside.size:
        raise HeadshareError(f"Unit {label(outside[0])} of the map has a donor outside the model.")
    kept = np.flatnonzero(flat != DROPPED)
    if not kept.size:
        raise HeadshareError("The map drops every unit; keep at least one.")
    orphans = kept[flat[flat[kept]] == DROPPED]
    if orphans.size:
        dropped, receiver = label(flat[orphans[0]]), label(orphans[0])
        raise HeadshareError(
            f"The map drops unit {dropped} (layer.unit), the donor of {receiver}; keep it, or drop both."
        )
    for unit in kept[flat[flat[kept]] != flat[kept]]:
        seen = [int(unit)]
        while flat[seen[-1]] != seen[-1]:
            seen.append(int(flat[seen[-1]]))
            if seen[-1] in seen[:-1]:
                raise HeadshareError(f"The map has a cycle: {' -> '.join(map(label, seen))} (layer.unit).")
        raise HeadshareError(
            f"The map has a chain: {' -> '.join(map(label, seen))} (layer.unit); "
            f"name the root {label(seen[-1])} as the donor of {label(seen[0])}."
        )


def _range(numbers: np.ndarray) -> str:
    least, most = int(numbers.min()), int(numbers.max())
    return f"{least}" if least == most else f"{least} to {most}"


def _identity(slots: np.ndarray) -> np.ndarray:
    """Every place's own flat index, shaped like `slots`."""
    return np.arange(slots.size).reshape(slots.shape)


def _frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


def shard_of_units(units: int, shards: int) -> np.ndarray:
    """int64 [U], the shard in which each of a layer's units lies; HeadshareError unless they divide evenly."""
    if shards < 1 or units % shards:
        raise HeadshareError(
            f"{units} units of a layer cannot be cut evenly into {shards} shards; give a divisor of {units}."
        )
    return np.arange(units) * shards // units
