"""Choosing widths: of every unit the columns whose loss costs most are kept, as many as a budget leaves."""

from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from headshare_jax.errors import HeadshareError, Unmet
from headshare_jax.sharing.budget import check_budget
from headshare_jax.sharing.map import shard_of_units
from headshare_jax.slim.kept import Kept
from headshare_jax.slim.pairs import Pairs
from headshare_jax.typed import check_fields

EVEN = ("layer", "model")
# Bisections of the price of a column, from one at which nothing goes to one at which all goes.
_BISECTIONS = 100


@dataclass(frozen=True)
class Rules:
    """What widths must be.

    Attributes:
      multiple: columns of values, and of queries and keys, that a unit keeps are a multiple of it, or all it had.
      even: one width for all units of a `layer` or of the `model`, none of which then is dropped; None: each its own.
      shards: chips over which the units of each layer are cut, each of which is to store as much; None: any.

    Raises:
      HeadshareError: a multiple or shards below 1, or an unknown `even`.
    """

    multiple: int = 1
    even: str | None = None
    shards: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.multiple < 1:
            raise HeadshareError(f"Widths must be multiples of at least 1, not {self.multiple}.", option="multiple")
        if self.even not in (None, *EVEN):
            raise HeadshareError(f"Widths can be even in a layer or the model, not {self.even!r}.", option="even")
        if self.shards is not None and self.shards < 1:
            raise HeadshareError(f"Units are cut over at least 1 shard, not {self.shards}.", option="within_shards")


@dataclass(frozen=True)
class Costs:
    """What it costs to keep less of every unit, in nats per token.

    Attributes:
      values: float64 [L, U, H + 1], of keeping the first r directions of the values.
      pairs: float64 [L, U, P, P]; cutting some entries of queries and keys costs the sum of their block. None: all
        must stay.
    """

    values: np.ndarray
    pairs: np.ndarray | None


def choose(
    costs: Costs, kept: Kept, size_p: np.ndarray, budget: float, rules: Rules, pairs: Pairs | None = None
) -> tuple[Kept, np.ndarray]:
    """The widths of least cost whose columns fit a budget.

    Every unit has the widths of least cost + price x columns, or is dropped if that is less; the price is found by
    bisection. What the budget then has left over is given to whom it helps most. Units share where that costs less at
    this price, and in all.

    Args:
      costs: of keeping less.
      kept: what is left so far; no unit gets more.
      size_p: as `pair_sizes` has it.
      budget: part of all L U 2 H columns, and so of attention's weights, to keep at most, in (0, 1].
      rules: what widths must be.
      pairs: units that may share; by default none.

    Returns:
      What is kept, and what it costs each unit, float64 [L, U].

    Raises:
      HeadshareError: a budget outside (0, 1] or below the narrowest widths, shards that do not divide the units, pairs
        where widths are to be even.
    """
    check_budget(budget)
    if pairs is not None and rules.even is not None:
        raise HeadshareError("Units of one width share nothing; leave even out, or sharing.", option="even")
    units = _Units.of(costs, kept, size_p, rules)
    stored = Fraction(0) if pairs is None else pairs.stored
    found = units.solve(kept, budget, rules, stored)
    if pairs is not None:
        donor_n, shared_n = pairs.worth_sharing(
            kept, kept.is_whole(size_p).ravel(), units.drop_n, found.price_n, units.least(found.price_n)
        )
        tied = Kept(kept.rank, kept.pairs, donor_n.reshape(kept.donor.shape))
        with suppress(Unmet):
            shared = units.solve(tied, budget, rules, stored)
            if shared.cost_n.sum() + shared_n.sum() < found.cost_n.sum():
                kept, found = tied, replace(shared, cost_n=shared.cost_n + shared_n)
    if not found.value_n.any():
        raise Unmet(f"A budget of {budget} cannot be met by slimming: every unit would go; keep more.")
    left = _pairs_left(units.order_np, kept.pairs.reshape(len(units.order_np), -1), size_p, found.query_n)
    rank = found.value_n.astype(np.int32).reshape(kept.rank.shape)
    return Kept(rank, left.reshape(kept.pairs.shape), kept.donor), found.cost_n.reshape(kept.rank.shape)


@dataclass(frozen=True)
class _Found:
    """Columns that every unit keeps of values, and of queries and keys, int64 [N]; what is added to the cost of each,
    and the price of a column, float64 [N]."""

    value_n: np.ndarray
    query_n: np.ndarray
    cost_n: np.ndarray
    price_n: np.ndarray


@dataclass(frozen=True)
class _Units:
    """What every unit may keep, by flat index.

    Attributes:
      value_nw, query_nw: float64 [N, H + 1], costs by the columns kept of values, and of queries and keys; inf: not
        allowed.
      drop_n: float64 [N], of dropping it.
      order_np: as of `_pair_paths`.
      shard_n: int64 [N], the shard that it lies in.
    """

    value_nw: np.ndarray
    query_nw: np.ndarray
    drop_n: np.ndarray
    order_np: np.ndarray
    shard_n: np.ndarray

    @classmethod
    def of(cls, costs: Costs, kept: Kept, size_p: np.ndarray, rules: Rules) -> "_Units":
        num_layers, units = kept.rank.shape
        width = costs.values.shape[-1] - 1
        shards = 1 if rules.shards is None or rules.even else rules.shards
        shard_n = np.tile(shard_of_units(units, shards), num_layers)
        value_nw = costs.values.reshape(-1, width + 1)
        order_np, query_nw = _pair_paths(costs.pairs, kept.pairs, size_p, width)
        return cls(
            _allowed(value_nw, kept.rank.ravel(), rules.multiple),
            _allowed(query_nw, (kept.pairs @ size_p).ravel(), rules.multiple),
            value_nw[:, 0],
            order_np,
            shard_n,
        )

    def solve(self, kept: Kept, budget: float, rules: Rules, stored: Fraction) -> _Found:
        """The widths of least cost within a budget; a receiver stores as much as `stored` columns."""
        width = self.value_nw.shape[1] - 1
        dropped_n, tied_n, receives_n = kept.dropped.ravel(), kept.tied.ravel(), kept.receives.ravel()
        value_n, query_n = np.where(tied_n, width, 0), np.where(tied_n, width, 0)
        price_n, shards = np.zeros(len(value_n)), int(self.shard_n.max()) + 1
        for shard in range(shards):
            here_n = self.shard_n == shard
            taken = sum(here_n & receives_n) * stored + 2 * width * int(sum(here_n & tied_n & ~receives_n))
            target = int(Fraction(str(budget)) * len(value_n) * 2 * width / shards - taken)
            groups = _groups(np.flatnonzero(here_n & ~dropped_n & ~tied_n), kept.rank.shape[1], rules.even)
            drop_g = np.full(len(groups), np.inf) if rules.even else self.drop_n[groups].sum(1)
            costs_kgw = np.stack([self.value_nw[groups], self.query_nw[groups]]).sum(axis=2)
            (value_g, query_g), price_n[here_n] = _Problem(costs_kgw, drop_g, groups.shape[1]).solve(target)
            value_n[groups], query_n[groups] = value_g[:, None], query_g[:, None]
        cost_n, some = np.where((value_n == 0) & ~dropped_n, self.drop_n, 0.0), np.flatnonzero(value_n)
        cost_n[some] = self.value_nw[some, value_n[some]] + self.query_nw[some, query_n[some]]
        return _Found(value_n, query_n, cost_n, price_n)

    def least(self, price_n: np.ndarray) -> np.ndarray:
        """float64 [N], the least that each unit and its columns cost at a price of a column."""
        paid_nw = price_n[:, None] * np.arange(self.value_nw.shape[1])
        kept_n = (self.value_nw + paid_nw).min(axis=1) + (self.query_nw + paid_nw).min(axis=1)
        return np.minimum(self.drop_n, kept_n)


def _groups(members_n: np.ndarray, units: int, even: str | None) -> np.ndarray:
    """Units that have one width, int [groups, members]."""
    if even is None:
        return members_n[:, None]
    return members_n.reshape(-1, units) if even == "layer" else members_n[None]


@dataclass(frozen=True)
class _Problem:
    """Costs of groups of units of one width.

    Attributes:
      cost_kgw: by the columns that each member keeps, of values and of queries and keys, [2, groups, H + 1]; inf: not
        allowed.
      drop_g: of dropping all of a group.
      members: units of a group.
    """

    cost_kgw: np.ndarray
    drop_g: np.ndarray
    members: int

    def solve(self, target: int) -> tuple[np.ndarray, float]:
        """Columns of values, and of queries and keys, of each group's members, int [2, groups], at most `target`.

        And the price of a column.
        """
        costs = np.concatenate([self.cost_kgw.ravel(), self.drop_g])
        low = 1e-30
        high = 2 * max(float(costs[np.isfinite(costs)].max(initial=0)), low)
        best_kg, price = self._at(low), low
        if self._size(best_kg) > target:
            best_kg, price = self._at(high), high
            if self._size(best_kg) > target:
                raise Unmet(
                    f"At least {self._size(best_kg):,} of all columns of attention stay where each unit keeps the "
                    f"narrowest widths that are allowed, and the budget leaves {target:,}; keep more."
                )
            for _ in range(_BISECTIONS):
                middle = float(np.sqrt(low * high))
                found_kg = self._at(middle)
                if self._size(found_kg) > target:
                    low = middle
                else:
                    high, price, best_kg = middle, middle, found_kg
        self._fill(best_kg, target)
        return best_kg, price

    def _size(self, width_kg: np.ndarray) -> int:
        return self.members * int(width_kg.sum())

    def _at(self, price: float) -> np.ndarray:
        """The widths of least cost at a price of a column."""
        paid_kgw = self.cost_kgw + price * self.members * np.arange(self.cost_kgw.shape[2])
        dropped_g = self.drop_g < paid_kgw.min(axis=2).sum(axis=0)
        return np.where(dropped_g, 0, paid_kgw.argmin(axis=2))

    def _fill(self, width_kg: np.ndarray, target: int) -> None:
        """Widens, in place, what gains most for a column as long as that fits."""
        while left := target - self._size(width_kg):
            now_kgw = np.take_along_axis(self.cost_kgw, width_kg[..., None], axis=2)
            more_kgw = self.members * (np.arange(self.cost_kgw.shape[2]) - width_kg[..., None])
            fits_kgw = (more_kgw > 0) & (more_kgw <= left) & (width_kg > 0)[..., None] & np.isfinite(self.cost_kgw)
            change_kgw = np.full(self.cost_kgw.shape, np.inf)
            np.subtract(self.cost_kgw, now_kgw, out=change_kgw, where=fits_kgw)
            change_kgw /= np.maximum(more_kgw, 1)
            kind, group, width = np.unravel_index(change_kgw.argmin(), change_kgw.shape)
            if not fits_kgw[kind, group, width]:
                return
            width_kg[kind, group] = width


def _allowed(cost_nw: np.ndarray, most_n: np.ndarray, multiple: int) -> np.ndarray:
    """Costs with inf where a width is not allowed; nothing at all is no width."""
    width_w = np.arange(cost_nw.shape[1])[None]
    allowed = (width_w > 0) & (width_w < most_n[:, None]) & (width_w % multiple == 0) | (width_w == most_n[:, None])
    return np.where(allowed, cost_nw, np.inf)


def _pair_paths(
    cost_lupp: np.ndarray | None, kept_lup: np.ndarray, size_p: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The order in which entries of queries and keys go, the cheapest for a column first, each beside those gone.

    Returns:
      int [N, P], entries in this order, those gone already first; float64 [N, H + 1], the cost by the columns left,
      inf where the order meets no such number.
    """
    entries = len(size_p)
    kept_np = kept_lup.reshape(-1, entries).copy()
    order_np, left_n = np.argsort(kept_np, axis=1, kind="stable"), kept_np @ size_p
    cost_nw = np.full((len(kept_np), width + 1), np.inf)
    cost_nw[np.arange(len(kept_np)), left_n] = 0
    if cost_lupp is None:
        return order_np, cost_nw
    cost_npp, total_n = cost_lupp.reshape(-1, entries, entries), np.zeros(len(kept_np))
    added_np = np.einsum("npp->np", cost_npp).copy()
    for _ in range(entries):
        live = np.flatnonzero(kept_np.any(axis=1))
        next_n = np.where(kept_np[live], added_np[live] / size_p, np.inf).argmin(axis=1)
        order_np[live, entries - kept_np[live].sum(axis=1)] = next_n
        kept_np[live, next_n] = False
        total_n[live] += added_np[live, next_n]
        added_np[live] += 2 * cost_npp[live, next_n]
        left_n[live] -= size_p[next_n]
        cost_nw[live, left_n[live]] = total_n[live]
    return order_np, cost_nw


def _pairs_left(order_np: np.ndarray, kept_np: np.ndarray, size_p: np.ndarray, columns_n: np.ndarray) -> np.ndarray:
    """bool [N, P]: the entries that are left once so many columns are."""
    last_first_np = order_np[:, ::-1]
    place_np = np.cumsum(size_p[last_first_np], axis=1) <= columns_n[:, None]
    left_np = np.zeros_like(kept_np)
    np.put_along_axis(left_np, last_first_np, place_np, axis=1)
    return left_np
