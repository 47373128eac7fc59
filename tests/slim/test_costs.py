"""Costs of keeping less: against a direct computation, and against how far predictions move."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ALL_VARIANTS, random_tokens, tiny_model

from headshare_jax import Llama
from headshare_jax.calibration.fisher import attention_gradients
from headshare_jax.calibration.streams import advance, layer_weights, window_heads
from headshare_jax.sharing.view import ReplacedView
from headshare_jax.slim.costs import measure
from headshare_jax.slim.cut import ValuePath, cut
from headshare_jax.slim.kept import Kept, pair_sizes

WINDOWS = random_tokens((3, 24))
FAMILIES = ["gqa", "attention bias", "phi3, partial rotary", "qwen3, biases"]
SLOW_FAMILIES = ["mha", "qwen2, windows", "smollm3"]


def layer_before(model: Llama, layer: int) -> jax.Array:
    """What a layer reads of the windows."""
    x_btd = model.embed_vd[...][WINDOWS]
    for below in range(layer):
        for block in ("attention", "mlp"):
            x_btd = advance(model.config, layer_weights(model, below), x_btd, block)
    return x_btd


def told_by_values(model: Llama, layer: int, g_btd: np.ndarray, projection_uhh: np.ndarray) -> np.ndarray:
    """g . (what a unit adds - what it adds of projected outputs), [M, U]."""
    config, weights = model.config, layer_weights(model, layer)
    z_btnh = np.asarray(window_heads(config, weights, layer_before(model, layer)), np.float64)
    z_mugh = z_btnh.reshape(-1, config.num_kv_heads, config.heads_per_unit, config.head_dim)
    gone_mugh = z_mugh - np.einsum("mugh,uhj->mugj", z_mugh, projection_uhh)
    o_ughd = np.asarray(weights["o_pool_phd"], np.float64).reshape(*z_mugh.shape[1:], -1)
    return np.einsum("mugh,ughd,md->mu", gone_mugh, o_ughd, g_btd.reshape(len(z_mugh), -1))


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FAMILIES)])
def test_costs_are_means_over_tokens_of_squared_first_order_changes(name: str) -> None:
    model = tiny_model(**ALL_VARIANTS[name])
    config = model.config
    costs, directions = measure(model, Kept.all_of(config), WINDOWS, batch_tokens=24)
    with attention_gradients(model, WINDOWS, batch_tokens=24) as gradients:
        gradients_lwtd = np.array(gradients, np.float64)
    for layer in range(config.num_layers):
        into, back = directions[layer].into_uhh, directions[layer].back_uhh
        for rank in (0, 1, config.head_dim // 2, config.head_dim - 1):
            told_mu = told_by_values(model, layer, gradients_lwtd[layer], into[:, :, :rank] @ back[:, :rank])
            expected_u = np.mean(told_mu**2, axis=0) / 2
            np.testing.assert_allclose(costs.values[layer, :, rank], expected_u, rtol=2e-4, atol=1e-12)
    assert not costs.values[..., -1].any()
    if config.qk_norm:
        assert costs.pairs is None
        return
    assert costs.pairs is not None
    told_mup = told_by_pairs(model, 1, gradients_lwtd[1])
    expected_upp = np.einsum("mup,mur->upr", told_mup, told_mup) / (2 * len(told_mup))
    np.testing.assert_allclose(costs.pairs[1], expected_upp, rtol=1e-3, atol=1e-4 * expected_upp.max())


def told_by_pairs(model: Llama, layer: int, g_btd: np.ndarray) -> np.ndarray:
    """How g . attention's output falls, to first order, with each entry of a token's queries of a unit, [M, U, P]."""
    config, weights = model.config, dict(layer_weights(model, layer))
    x_btd, entries = layer_before(model, layer), len(pair_sizes(config))
    half, group = config.rotary_dim // 2, config.heads_per_unit
    entry_h = np.r_[np.arange(half), np.arange(half), np.arange(half, entries)]
    tokens, units = x_btd.shape[0] * x_btd.shape[1], config.num_kv_heads
    q_name, b_name = "q_pool_pdh", "q_bias_ph"

    def along(scale_up: jax.Array) -> jax.Array:
        scale_nh = jnp.repeat(scale_up[:, entry_h], group, axis=0)
        scaled = weights | {q_name: weights[q_name] * scale_nh[:, None]}
        if b_name in weights:
            scaled[b_name] = weights[b_name] * scale_nh
        z_btnh = window_heads(config, scaled, x_btd)
        y_btd = jnp.einsum("btnh,nhd->btd", z_btnh, weights["o_pool_phd"])
        return jnp.sum(y_btd * g_btd, axis=-1).ravel()

    with jax.default_matmul_precision("highest"):
        told_mup = jax.jacfwd(along)(jnp.ones((units, entries)))
    return np.asarray(told_mup, np.float64).reshape(tokens, units, entries)


def test_a_cost_is_how_far_predictions_move() -> None:
    """The mean KL divergence of a small change in the last layer, behind which tokens do not act together."""
    dense, tokens, layer = tiny_model(**ALL_VARIANTS["attention bias"]), random_tokens((60, 24)), 2
    o_nhd = np.array(dense.read("o_pool_phd", layer))
    o_nhd[:2] *= 0.2
    model = ReplacedView(dense, {("o_pool_phd", layer): o_nhd})
    costs, _ = measure(model, Kept.all_of(model.config), tokens, batch_tokens=240)
    without = np.array(o_nhd)
    without[:2] = 0
    expected, found = (
        jax.nn.log_softmax(Llama.of(ReplacedView(dense, {("o_pool_phd", layer): each}))(jnp.asarray(tokens)))
        for each in (o_nhd, without)
    )
    moved = float(jnp.mean(jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)))
    assert 0.9 * moved < costs.values[layer, 0, 0] < 1.1 * moved


def test_what_is_cut_costs_nothing_more() -> None:
    model = tiny_model()
    config, whole = model.config, Kept.all_of(model.config)
    _, directions = measure(model, whole, WINDOWS)
    rank_lu = np.full_like(whole.rank, 6)
    replaced = {}
    for layer in range(config.num_layers):
        path = cut(ValuePath.read(model, layer), directions[layer], rank_lu[layer])
        replaced |= path.slices(model, layer)
    costs, again = measure(ReplacedView(model, replaced), replace(whole, rank=rank_lu), WINDOWS)
    assert (costs.values[..., 6:] < 1e-12 * costs.values[..., :1]).all()
    assert (costs.values[..., 5] > 1e-6 * costs.values[..., 0]).all()
    for layer in again:
        assert not layer.into_uhh[:, 6:].any()
        assert not layer.back_uhh[:, :, 6:].any()
        identity_uhh = layer.back_uhh[:, :6, :6] @ layer.into_uhh[:, :6, :6]
        np.testing.assert_allclose(identity_uhh, np.tile(np.eye(6), (len(identity_uhh), 1, 1)), atol=1e-6)
