"""Choosing widths: of every unit the columns whose loss costs most are kept, as many as a budget leaves."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from headshare_jax.errors import HeadshareError, Unmet
from headshare_jax.sharing.budget import check_budget
from headshare_jax.sharing.map import shard_of_units
from headshare_jax.slim.kept import Kept
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


def choose(costs: Costs, kept: Kept, size_p: np.ndarray, budget: float, rules: Rules) -> tuple[Kept, np.ndarray]:
    """The widths of least cost whose columns fit a budget.

    Every unit has the widths of least cost + price x columns, or is dropped if that is less; the price is found by
    bisection. What the budget then has left over is given to whom it helps most.

    Args:
      costs: of keeping less.
      kept: what is left so far; no unit gets more.
      size_p: as `pair_sizes` has it.
      budget: part of all L U 2 H columns, and so of attention's weights, to keep at most, in (0, 1].
      rules: what widths must be.

    Returns:
      What is kept, and what it costs each unit, float64 [L, U].

    Raises:
      HeadshareError: a budget outside (0, 1] or below the narrowest widths, shards that do not divide the units.
    """
    check_budget(budget)
    num_layers, units = kept.rank.shape
    width = costs.values.shape[-1] - 1
    shards = 1 if rules.shards is None or rules.even else rules.shards
    shard_n = np.tile(shard_of_units(units, rules.shards or 1) if shards > 1 else np.zeros(units, int), num_layers)
    value_nw = costs.values.reshape(-1, width + 1)
    drop_n = value_nw[:, 0]
    order_np, pair_nw = _pair_paths(costs.pairs, kept.pairs, size_p, width)
    value_nw = _allowed(value_nw, kept.rank.ravel(), rules.multiple)
    pair_nw = _allowed(pair_nw, (kept.pairs @ size_p).ravel(), rules.multiple)
    whole = Fraction(str(budget)) * kept.rank.size * 2 * width
    value_n, columns_n = np.zeros(kept.rank.size, np.int64), np.zeros(kept.rank.size, np.int64)
    for shard in range(shards):
        mine = np.flatnonzero((shard_n == shard) & ~kept.dropped.ravel())
        groups = _groups(mine, units, rules.even)
        drop_g = np.full(len(groups), np.inf) if rules.even else drop_n[groups].sum(1)
        problem = _Problem(np.stack([value_nw[groups], pair_nw[groups]]).sum(axis=2), drop_g, groups.shape[1])
        value_g, columns_g = problem.solve(int(whole // shards))
        value_n[groups], columns_n[groups] = value_g[:, None], columns_g[:, None]
    if not value_n.any():
        raise Unmet(f"A budget of {budget} cannot be met by slimming: every unit would go; keep more.")
    cost_n = np.where(value_n == 0, drop_n, 0.0)
    some = np.flatnonzero(value_n)
    cost_n[some] = value_nw[some, value_n[some]] + pair_nw[some, columns_n[some]]
    cost_n[kept.dropped.ravel()] = 0
    pairs = _pairs_left(order_np, kept.pairs.reshape(len(order_np), -1), size_p, columns_n)
    chosen = Kept(value_n.astype(np.int32).reshape(kept.rank.shape), pairs.reshape(kept.pairs.shape))
    return chosen, cost_n.reshape(kept.rank.shape)


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

    def solve(self, target: int) -> np.ndarray:
        """Columns of values, and of queries and keys, of each group's members, int [2, groups], at most `target`."""
        costs = np.concatenate([self.cost_kgw.ravel(), self.drop_g])
        low = 1e-30
        high = 2 * max(float(costs[np.isfinite(costs)].max(initial=0)), low)
        best_kg = self._at(low)
        if self._size(best_kg) > target:
            best_kg = self._at(high)
            if self._size(best_kg) > target:
                raise Unmet(
                    f"At least {self._size(best_kg):,} of all columns of attention stay where each unit keeps the "
                    f"narrowest widths that are allowed, and the budget leaves {target:,}; keep more."
                )
            for _ in range(_BISECTIONS):
                price = float(np.sqrt(low * high))
                found_kg = self._at(price)
                if self._size(found_kg) > target:
                    low = price
                else:
                    high, best_kg = price, found_kg
        self._fill(best_kg, target)
        return best_kg

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
