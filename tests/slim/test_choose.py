"""Choosing widths: budgets met to the column, what is allowed kept to, and no cheaper choice by exchanging columns."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headshare_jax import HeadshareError
from headshare_jax.sharing.scores import MatchResult, best_donors
from headshare_jax.slim.choose import Costs, Rules, choose
from headshare_jax.slim.kept import Kept
from headshare_jax.slim.pairs import Pairs

LAYERS, UNITS = 3, 4


def random_costs(seed: int, width: int, entries: int) -> Costs:
    """Costs as measured ones are: values' fall as more is kept, and pairs' blocks have no negative sum."""
    rng = np.random.default_rng(seed)
    steps = rng.gamma(0.3, size=(LAYERS, UNITS, width + 1)) * rng.gamma(1, size=(LAYERS, UNITS, 1))
    steps[..., -1] = 0
    told = rng.normal(size=(LAYERS, UNITS, 20, entries)) * rng.gamma(1, size=(LAYERS, UNITS, 1, entries))
    return Costs(np.cumsum(steps[..., ::-1], axis=-1)[..., ::-1], np.einsum("lump,lumr->lupr", told, told) / 40)


def everything(size_p: np.ndarray) -> Kept:
    return Kept.whole(LAYERS, UNITS, size_p)


def cost_of(costs: Costs, kept: Kept) -> float:
    """What it costs to keep this of whole units."""
    total = 0.0
    for layer, unit in product(range(LAYERS), range(UNITS)):
        total += costs.values[layer, unit, kept.rank[layer, unit]]
        if kept.rank[layer, unit] and costs.pairs is not None:
            gone = ~kept.pairs[layer, unit]
            total += costs.pairs[layer, unit][np.ix_(gone, gone)].sum()
    return total


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), budget=st.integers(30, 100), singles=st.integers(0, 3))
def test_a_budget_is_met_to_the_column(seed: int, budget: int, singles: int) -> None:
    size_p = np.repeat([2, 1], [4, 2 * singles])
    width = int(size_p.sum())
    costs, whole = random_costs(seed, width, len(size_p)), everything(size_p)
    chosen, cost = choose(costs, whole, size_p, budget / 100, Rules())
    columns = chosen.columns(size_p)
    # A pair that does not fit may leave one column over; all that is kept may be whole.
    whole_units = (columns[~chosen.dropped] == 2 * width).all()
    assert 0 <= LAYERS * UNITS * 2 * width * budget // 100 - columns.sum() <= 1 or whole_units
    assert (chosen.pairs.any(axis=-1) != chosen.dropped).all()
    np.testing.assert_allclose(cost.sum(), cost_of(costs, chosen), rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    budget=st.integers(50, 100),
    multiple=st.sampled_from([1, 4, 8]),
    even=st.sampled_from([None, "layer", "model"]),
    shards=st.sampled_from([None, 2, 4]),
)
def test_widths_keep_to_their_rules(
    seed: int, budget: int, multiple: int, even: str | None, shards: int | None
) -> None:
    width, size_p = 16, np.full(8, 2)
    rules = Rules(multiple, even, shards)
    first, _ = choose(random_costs(seed, width, 8), everything(size_p), size_p, 1 - (100 - budget) / 200, rules)
    chosen, _ = choose(random_costs(seed + 1, width, 8), first, size_p, budget / 100, rules)
    columns = chosen.columns(size_p)
    assert columns.sum() <= LAYERS * UNITS * 2 * width * budget / 100
    assert (chosen.rank <= first.rank).all()
    assert (chosen.pairs <= first.pairs).all()
    qk = chosen.pairs @ size_p
    for found, before in ((chosen.rank, first.rank), (qk, first.pairs @ size_p)):
        assert ((found % multiple == 0) | (found == before)).all()
    if even is not None:
        assert not chosen.dropped.any()
        for found in (chosen.rank, qk):
            assert (found == (found[:1, :1] if even == "model" else found[:, :1])).all()
    if shards is not None:
        per_shard = columns.reshape(LAYERS, shards, -1).sum(axis=(0, 2))
        assert (per_shard <= LAYERS * UNITS * 2 * width * budget / 100 / shards).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999))
def test_no_exchange_of_two_value_columns_is_cheaper(seed: int) -> None:
    """Where each column of a unit costs more than the next, taking one from a unit for another gains nothing."""
    width, size_p = 8, np.full(4, 2)
    costs, whole = random_costs(seed, width, 4), everything(size_p)
    falling = np.sort(np.diff(costs.values[..., ::-1], axis=-1), axis=-1)
    values = np.concatenate([np.zeros((LAYERS, UNITS, 1)), np.cumsum(falling, axis=-1)], axis=-1)[..., ::-1]
    costs = Costs(values, None)
    chosen, _ = choose(costs, whole, size_p, 0.8, Rules())
    kept = ~chosen.dropped
    gains = values[..., :-1] - values[..., 1:]
    more = [gains[place][chosen.rank[place]] for place in zip(*np.where(kept & (chosen.rank < width)), strict=True)]
    less = [gains[place][chosen.rank[place] - 1] for place in zip(*np.where(kept & (chosen.rank > 1)), strict=True)]
    assert max(more, default=0) <= min(less, default=np.inf) + 1e-12


def test_queries_and_keys_that_must_stay_do() -> None:
    size_p = np.full(4, 2)
    costs = Costs(random_costs(0, 8, 4).values, None)
    chosen, _ = choose(costs, everything(size_p), size_p, 0.7, Rules())
    assert chosen.pairs[~chosen.dropped].all()
    assert (chosen.rank < 8).any()


def shared(scored: dict[tuple[int, int], float], drop: float = 1.0) -> Pairs:
    """Pairs (receiver, donor) with their costs, where dropping any unit costs as much."""
    scores = np.full((LAYERS * UNITS, LAYERS * UNITS), -np.inf, np.float32)
    for pair, cost in scored.items():
        scores[pair] = -cost
    donors = best_donors(scores, UNITS)
    drops = np.full((LAYERS, UNITS), -drop, np.float32)
    return Pairs.of(MatchResult(*donors, "functional", 3, scores=scores, drop_score=drops), 8)


def test_units_share_where_that_costs_less() -> None:
    """A receiver of a group of three keeps three quarters of half its columns, and its donor all of its own."""
    size_p, whole = np.full(4, 2), everything(np.full(4, 2))
    costs = random_costs(0, 8, 4)
    _, cost = choose(costs, whole, size_p, 0.8, Rules())
    chosen, less = choose(costs, whole, size_p, 0.8, Rules(), shared({(9, 1): 0.0, (5, 9): 0.0, (6, 1): 2.0}))
    assert chosen.donor.ravel().tolist() == [1 if unit == 9 else unit for unit in range(12)]
    assert less.sum() < cost.sum()
    columns = chosen.columns(size_p).ravel()
    assert columns[[1, 9]].tolist() == [16, 16]
    assert np.delete(columns, 9).sum() + 6 <= 0.8 * 12 * 16
    # What shares already stays as it is, whatever else costs.
    later, _ = choose(random_costs(1, 8, 4), chosen, size_p, 0.6, Rules(), shared({(9, 5): 0.0, (1, 4): 0.0}))
    assert later.donor.ravel().tolist() == chosen.donor.ravel().tolist()
    assert later.columns(size_p).ravel()[[1, 9]].tolist() == [16, 16]
    assert np.delete(later.columns(size_p).ravel(), 9).sum() + 6 <= 0.6 * 12 * 16


def test_units_do_not_share_where_that_gains_nothing() -> None:
    size_p, whole, costs = np.full(4, 2), everything(np.full(4, 2)), random_costs(0, 8, 4)
    chosen, cost = choose(costs, whole, size_p, 0.8, Rules())
    same, likewise = choose(costs, whole, size_p, 0.8, Rules(), shared({(9, 1): 0.99, (4, 2): 0.9}))
    assert not same.receives.any()
    assert (same.rank == chosen.rank).all()
    assert (likewise == cost).all()
    with pytest.raises(HeadshareError, match="share nothing"):
        choose(costs, whole, size_p, 0.8, Rules(even="layer"), shared({(9, 1): 0.0}))


def test_pairs_that_undo_each_other_go_together() -> None:
    """Two entries that tell the opposite cost nothing together, and much alone."""
    size_p, values = np.full(4, 2), np.tile(np.arange(8, -1, -1.0), (LAYERS, UNITS, 1)) * 100
    told = np.array([[3.0, 1.0, -3.0, 10.0]])
    pairs = np.tile(told.T @ told, (LAYERS, UNITS, 1, 1))
    chosen, cost = choose(Costs(values, pairs), everything(size_p), size_p, 1 - 6 / 16, Rules())
    assert chosen.pairs.tolist() == [[[False, False, False, True]] * UNITS] * LAYERS
    assert cost.max() <= 1


@pytest.mark.parametrize(
    ("budget", "rules", "words"),
    [
        (0.0, {}, "budget must be above 0"),
        (1.1, {}, "budget must be above 0"),
        (0.001, {}, "every unit would go"),
        (0.1, {"even": "model", "multiple": 4}, "keep more"),
        (0.5, {"shards": 3}, "cut evenly into 3 shards"),
        (0.5, {"shards": 0}, "at least 1 shard"),
        (0.5, {"multiple": 0}, "multiples of at least 1"),
        (0.5, {"multiple": 1.5}, "a whole number"),
        (0.5, {"even": "unit"}, "even in a layer or the model"),
    ],
)
def test_what_cannot_be_is_refused(budget: float, rules: dict[str, int | str], words: str) -> None:
    size_p = np.full(4, 2)
    with pytest.raises(HeadshareError, match=words):
        choose(random_costs(0, 8, 4), everything(size_p), size_p, budget, Rules(**rules))  # type: ignore[arg-type]
