"""Plans within a budget: what they save, what they leave alone, and what they refuse."""

from dataclasses import replace
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import random_tokens, tiny_model

from headshare_jax import HeadshareError, LlamaConfig, MatchResult, ledger, match, match_functional, share
from headshare_jax.matching.cosine import magnitudes
from headshare_jax.methods.scored import ScoredMethod
from headshare_jax.methods.table import METHODS
from headshare_jax.methods.work import Amount, MethodSettings, Work
from headshare_jax.sharing.budget import DROP, attention_budget, budget_map, unit_parameters, units_to_save
from headshare_jax.sharing.choose import drop_map

CONFIG = tiny_model(num_hidden_layers=4).config


def named(name: str) -> ScoredMethod:
    method = METHODS[name]
    assert isinstance(method, ScoredMethod)
    return method


def scored(config: LlamaConfig, seed: int) -> MatchResult:
    """Functional scores drawn at random; donors are in earlier layers."""
    rng = np.random.default_rng(seed)
    units, shape = config.num_units, (config.num_layers, config.num_kv_heads)
    layer = np.arange(units) // config.num_kv_heads
    scores = np.where(layer[:, None] > layer[None, :], -rng.exponential(size=(units, units)), -np.inf)
    nobody = np.full(shape, -1, np.int32)
    return MatchResult(
        donor_layer=nobody,
        donor_unit=nobody,
        value=scores.max(axis=1).reshape(shape),
        match="functional",
        heads_per_unit=config.heads_per_unit,
        scores=scores.astype(np.float32),
        tie_scores={"qk": (0.7 * scores).astype(np.float32)},
        drop_score=-rng.exponential(size=shape).astype(np.float32),
    )


@given(
    budget=st.floats(0.3, 1.0),
    actions=st.sampled_from([(DROP,), (DROP, "qkv"), (DROP, "qk"), (DROP, "qkv", "qk")]),
    seed=st.integers(0, 99),
)
def test_a_plan_saves_what_it_must_and_no_change_more(budget: float, actions: tuple[str, ...], seed: int) -> None:
    sharing = budget_map(scored(CONFIG, seed), CONFIG, budget, actions=actions)
    sizes = unit_parameters(CONFIG)
    saved_lu = sum(size * (sharing.tied(p) | sharing.dropped) for p, size in sizes.items())
    assert isinstance(saved_lu, np.ndarray)
    target = (1 - Fraction(str(budget))) * CONFIG.num_units * sum(sizes.values())
    assert int(saved_lu.sum()) >= target
    changed = saved_lu[saved_lu > 0]
    assert all(int(saved_lu.sum() - each) < target for each in changed)
    assert set(sharing.unit_tie[sharing.receives]) <= set(actions) - {DROP}  # type: ignore[index]
    assert (np.isfinite(sharing.score) == (sharing.receives | sharing.dropped)).all()


@pytest.mark.parametrize(("budget", "dropped"), [(0.7, 3), (0.9, 1), (0.8, 2), (0.71, 3)])
def test_no_unit_goes_for_rounding(budget: float, dropped: int) -> None:
    config = replace(CONFIG, num_layers=10 // CONFIG.num_kv_heads)
    assert budget_map(scored(config, 0), config, budget, actions=(DROP,)).dropped.sum() == dropped


@given(seed=st.integers(0, 99))
def test_a_unit_is_done_without_where_that_costs_least(seed: int) -> None:
    result = scored(CONFIG, seed)
    sharing = budget_map(result, CONFIG, 1 - 1 / CONFIG.num_units, actions=(DROP,))
    assert result.drop_score is not None
    assert np.flatnonzero(sharing.dropped).tolist() == [result.drop_score.argmax()]
    assert drop_map(result, 1 / CONFIG.num_units).donor.tolist() == sharing.donor.tolist()


def test_the_stored_parameters_fit_the_budget() -> None:
    model = tiny_model(num_hidden_layers=4)
    result = match_functional(model, random_tokens((4, 16)))
    dense = sum(row.stored for row in ledger(model).rows if row.part in "qkvo")
    for name, budgets in {"budget": (0.9, 0.7, 0.5), "drop": (0.7, 0.5), "fitted": (0.9, 0.8)}.items():
        for budget in budgets:
            if name == "budget":
                sharing = budget_map(result, model.config, budget)
            else:
                sharing = named(name).chosen(result, Amount(budget=budget), model.config, MethodSettings())
            assert (sharing.method, sharing.budget) == (name, budget)
            sizes = ledger(share(model, sharing))
            stored = sum(row.stored for row in sizes.rows if row.part in "qkvo")
            assert stored <= budget * dense + 1e-6
            assert stored > budget * dense - sum(unit_parameters(model.config).values())
            assert sizes.nominal_saving == dense - stored


def test_a_budget_for_the_whole_model_is_met_in_attention() -> None:
    model = tiny_model(num_hidden_layers=4)
    for kept in (0.97, 0.9):
        budget = attention_budget(model.config, kept)
        sizes = ledger(share(model, budget_map(scored(model.config, 0), model.config, budget)))
        assert sizes.stored <= kept * sizes.dense < sizes.stored + sum(unit_parameters(model.config).values())
    assert attention_budget(model.config, 1.0) == 1.0
    with pytest.raises(HeadshareError, match=r"what is not attention, .* is 0.6\d\d of the model"):
        attention_budget(model.config, 0.5)


def test_weight_scores_meet_a_budget_too() -> None:
    model = tiny_model(num_hidden_layers=4)
    for name in ("direct", "random"):
        result = named(name).scored(Work(model))
        sharing = named(name).chosen(result, Amount(budget=0.8), model.config, MethodSettings(tie="qkv"))
        assert len(sharing.receivers) == units_to_save(model.config, 0.8, "qkv")
        assert sharing.budget == 0.8


def test_the_smallest_units_are_those_with_the_least_norm() -> None:
    model = tiny_model()
    small = jnp.asarray(np.array(model.o_pool_phd[...])).at[4:6].multiply(1e-3)
    model.o_pool_phd[...] = small
    result = magnitudes(model)
    assert drop_map(result, 1 / 6).donor.ravel().tolist() == [0, 1, -1, 3, 4, 5]
    norm = sum(np.sum(np.square(np.asarray(model.read(f"{p}_pool_{'phd' if p == 'o' else 'pdh'}", 0))[:g]))
               for p, g in {"q": 2, "k": 1, "v": 1, "o": 2}.items())  # fmt: skip
    np.testing.assert_allclose(-result.drop_score[0, 0], np.sqrt(norm), rtol=1e-6)  # type: ignore[index]


def test_what_cannot_be_is_refused() -> None:
    result = scored(CONFIG, 0)
    for budget in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(HeadshareError, match="budget must be above 0"):
            budget_map(result, CONFIG, budget)
    with pytest.raises(HeadshareError, match="cannot be met"):
        budget_map(result, CONFIG, 0.1, actions=("qkv",))
    with pytest.raises(HeadshareError, match="functional scores"):
        budget_map(match(tiny_model(), "qk"), CONFIG, 0.5)
    with pytest.raises(HeadshareError, match="functional scores of v"):
        budget_map(result, CONFIG, 0.5, actions=("v",))
    with pytest.raises(HeadshareError, match="dropping a unit costs"):
        drop_map(match(tiny_model(), "qk"), 0.3)
