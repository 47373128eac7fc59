"""The method slim: budgets are met, settings reach the widths, and budgets have their first rounds in common."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import calls_of, random_tokens, tiny_model

import headshare_jax as hs
from headshare_jax.methods.table import find
from headshare_jax.methods.work import Amount, Made, MethodSettings, Work
from headshare_jax.slim import rounds


@pytest.fixture(scope="module")
def model() -> hs.Llama:
    return tiny_model()


def made(
    model: hs.Llama, budget: float, settings: MethodSettings | None = None, method: str = "slim", **more: Any
) -> Made:
    work = Work(model, settings or MethodSettings(), random_tokens((4, 16)), **more)
    return find(method, work.settings).make(work, Amount(budget=budget))


def same(one: Made, other: Made) -> bool:
    layers, names = range(one.model.config.num_layers), [f"{p}_pool_{'phd' if p == 'o' else 'pdh'}" for p in "qkvo"]
    slices = [(name, layer) for name in names for layer in layers]
    return one.map == other.map and all(np.array_equal(one.model.read(*at), other.model.read(*at)) for at in slices)


@pytest.mark.parametrize("budget", [0.9, 0.7])
def test_a_budget_is_met_and_the_rest_fitted(model: hs.Llama, budget: float) -> None:
    found = made(model, budget)
    sizes = hs.ledger(hs.Llama.of(found.model))
    assert 0.9 * budget * sizes.attention_dense < sizes.attention_stored <= budget * sizes.attention_dense
    assert found.model.sharing == found.map
    assert (found.map.method, found.map.budget) == ("slim", budget)
    assert found.map.slim.any()
    assert found.fit is not None
    assert all(block.error_after <= block.error_before for block in found.fit.blocks)


def test_widths_are_even_where_that_is_asked_for(model: hs.Llama) -> None:
    for even, axes in (("layer", 1), ("model", (0, 1))):
        widths = made(model, 0.7, MethodSettings(even=even)).map.widths
        assert widths is not None
        for kept in (widths.rank, widths.qk.sum(axis=2)):
            assert np.array_equal(kept.min(axis=axes), kept.max(axis=axes))


def test_every_shard_keeps_as_much(model: hs.Llama) -> None:
    sharing = made(model, 0.7, MethodSettings(within_shards=2)).map
    assert sharing.widths is not None
    columns_lu = np.where(sharing.dropped, 0, sharing.widths.rank + sharing.widths.qk.sum(axis=2))
    assert 0.35 - 0.04 < columns_lu.sum(axis=0).min() / (columns_lu.size * 2 * sharing.widths.head_dim) <= 0.35
    assert columns_lu.sum(axis=0).max() / (columns_lu.size * 2 * sharing.widths.head_dim) <= 0.35


def test_units_that_compute_the_same_share_by_the_method_plan(model: hs.Llama) -> None:
    """A unit whose donor gives what it does itself costs nothing as a receiver, and its outputs stay."""
    graph, state = nnx.split(model)
    twin = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    units = [place * twin.config.num_kv_heads for place in range(twin.config.num_layers)]
    twin.o_pool_phd[...] = twin.o_pool_phd[...].at[:].multiply(0.05)
    for name in ("q_pool_pdh", "k_pool_pdh", "v_pool_pdh"):
        pool = getattr(twin, name)
        heads = len(pool[...]) // len(units) // twin.config.num_kv_heads
        pool[...] = pool[...].at[units[1] * heads : (units[1] + 1) * heads].set(pool[...][:heads])
    found = made(twin, 0.9, method="plan")
    assert found.map.receives.any()
    assert found.map.method == "plan"
    assert found.model.sharing == found.map
    assert not (found.map.slim & found.map.receives).any()
    sizes = hs.ledger(hs.Llama.of(found.model))
    assert sizes.attention_stored <= 0.9 * sizes.attention_dense


def test_budgets_have_their_first_rounds_in_common(
    model: hs.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = made(model, 0.75), made(model, 0.7)
    measured = calls_of(monkeypatch, rounds, "measure")
    journals = hs.JournalFolder(tmp_path / "work")
    assert same(made(model, 0.75, journals=journals), alone[0])
    assert len(measured) == 3
    assert same(made(model, 0.7, journals=journals), alone[1])
    assert len(measured) == 4
    assert same(made(model, 0.7, journals=journals), alone[1])
    assert len(measured) == 4


def test_a_ratio_and_other_settings_are_refused() -> None:
    with pytest.raises(hs.HeadshareError, match="slim needs a budget, not a ratio"):
        find("slim").make(Work(tiny_model(), windows_wt=random_tokens((4, 16))), Amount(ratio=0.3))
    with pytest.raises(hs.HeadshareError, match=r"slim has no use for tie \(these have: direct"):
        find("slim", MethodSettings(tie="qk"))
    with pytest.raises(hs.HeadshareError, match=r"plan has no use for even \(these have: slim"):
        find("plan", MethodSettings(even="layer"))
    with pytest.raises(hs.HeadshareError, match="not 'head'") as refused:
        MethodSettings(even="head")
    assert refused.value.options == ("even",)
