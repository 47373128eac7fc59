"""Functional matching: scores against least squares, and what they must not depend on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalent_models import equivalent, with_params
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ALL_VARIANTS, VARIANTS, random_tokens, sharing_by_hand, tiny_model

from headshare_jax import HeadshareError, Llama, match_functional, share, sharing_map
from headshare_jax.calibration.fisher import attention_gradients
from headshare_jax.calibration.streams import BLOCKS, advance, features, layer_weights
from headshare_jax.matching.elimination import dropped_solution, pair_residuals, shared_solution
from headshare_jax.matching.functional import FunctionalSettings

WINDOWS = random_tokens((8, 32))


@settings(max_examples=20)
@given(units=st.integers(1, 4), size=st.integers(1, 5), ridge=st.floats(1e-4, 10), seed=st.integers(0, 99))
def test_a_residual_is_that_of_solving_for_it_alone(units: int, size: int, ridge: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    h, o = rng.normal(size=(60, units * size)), rng.normal(size=(units * size, 3))
    donors = [rng.normal(size=(60, size)) + rng.normal() * h[:, :size] for _ in range(2)]
    cross, own = np.stack([h.T @ g for g in donors]), np.stack([g.T @ g for g in donors])
    root = rng.normal(size=(3, 3))
    outer = o @ root @ root.T @ o.T
    shared = pair_residuals(h.T @ h, cross, own, outer, ridge)
    rho = ridge * np.mean(np.sum(h**2, axis=0))
    inverse = np.linalg.inv(h.T @ h + rho * np.eye(len(o)))

    def best_change(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Of some rows of the output weight, to do with the features what o does with h; [I, D]."""
        system = np.concatenate([features[:, rows], np.sqrt(rho) * np.eye(len(rows))])
        values = np.concatenate([h @ o - features @ o, np.zeros((len(rows), 3))])
        change = np.zeros_like(o)
        change[rows] = np.linalg.lstsq(system, values)[0]
        return change

    for unit in range(units):
        rows = slice(unit * size, (unit + 1) * size)
        without = h.copy()
        without[:, rows] = 0
        change = best_change(without, np.setdiff1d(np.arange(len(o)), np.arange(len(o))[rows]))
        np.testing.assert_allclose(dropped_solution(inverse, rows) @ o[rows], change, atol=1e-8)
        for donor, g in enumerate(donors):
            changed = h.copy()
            changed[:, rows] = g
            change = best_change(changed, np.arange(len(o)))
            found = shared_solution(inverse, rho, cross[donor], own[donor], rows) @ o[rows]
            np.testing.assert_allclose(found, change, atol=1e-8)
            left = (h @ o - changed @ (o + change)) @ root
            squares = np.sum(left**2) + rho * np.sum((change @ root) ** 2)
            np.testing.assert_allclose(shared[unit, donor], squares, rtol=1e-8)


@pytest.mark.parametrize(
    "overrides", [VARIANTS["tied"], {"attention_bias": True, "mlp_bias": True}, ALL_VARIANTS["smollm3, windows"]]
)
def test_gradients_are_those_of_the_log_probability_of_tokens_the_model_draws(overrides: dict[str, Any]) -> None:
    dense = tiny_model(**overrides)
    config, tokens = dense.config, random_tokens((2, 12))
    layers = [layer_weights(dense, layer) for layer in range(config.num_layers)]

    def logits(changes_lbtd: jax.Array) -> jax.Array:
        x_btd = dense.embed_vd[...][tokens]
        for weights, change_btd in zip(layers, changes_lbtd, strict=True):
            x_btd = advance(config, weights, advance(config, weights, x_btd, "attention") + change_btd, "mlp")
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_btd), axis=-1, keepdims=True) + config.rms_norm_eps)
        return dense.logits(x_btd * inverse * dense.final_norm_d[...][None, None])

    nothing = jnp.zeros((config.num_layers, 2, 12, config.hidden_size))
    np.testing.assert_allclose(logits(nothing), dense(jnp.asarray(tokens)), atol=1e-5)
    with attention_gradients(dense, tokens, batch_tokens=12) as found:
        gradients = np.array(found)
    # The draws are not known here: they are the tokens whose log-probabilities have these gradients.
    of_tokens = jax.vjp(logits, nothing)[1]
    last = config.num_layers - 1
    for window in range(2):
        for place in (0, 11):
            rows = []
            for token in range(config.vocab_size):
                probability_v = jax.nn.softmax(logits(nothing)[window, place])
                cotangent = jnp.zeros((2, 12, config.vocab_size)).at[window, place].set(-probability_v)
                rows.append(cotangent.at[window, place, token].add(1.0))
            through = jax.vmap(of_tokens)(jnp.stack(rows))[0]
            distance = np.abs(np.asarray(through)[:, last, window, place] - gradients[last, window, place]).max(axis=-1)
            assert distance.min() < 1e-4 * np.abs(gradients).max()


@pytest.mark.parametrize("overrides", [{}, VARIANTS["mha"] | {"attention_bias": True}], ids=["gqa", "mha, bias"])
def test_scores_are_what_is_left_after_a_refit_along_the_gradients(overrides: dict[str, Any]) -> None:
    dense = tiny_model(**overrides)
    config, units = dense.config, dense.config.num_kv_heads
    result = match_functional(dense, WINDOWS, FunctionalSettings(span=2, ridge=0.1, keep=99), ties=("qk",))
    with attention_gradients(dense, WINDOWS) as gradients:
        g = np.asarray(gradients[1], np.float64).reshape(WINDOWS.size, -1)
    x, weights = inputs(dense, 1), layer_weights(dense, 1)

    def heads(weights: dict[str, jax.Array]) -> np.ndarray:
        return np.asarray(features(config, weights, jnp.asarray(x), "attention"), np.float64).reshape(WINDOWS.size, -1)

    h, o = heads(weights), np.asarray(weights["o_pool_phd"], np.float64).reshape(-1, config.hidden_size)
    y = h @ o + np.asarray(weights.get("o_bias_ld", 0.0))
    w = 1 / np.linalg.norm(x.reshape(WINDOWS.size, -1) + y, axis=1, keepdims=True)
    rho = 0.1 * np.mean(np.sum((w * h) ** 2, axis=0))

    def cost(changed: np.ndarray, fitted: np.ndarray) -> float:
        system = np.concatenate([w * changed[:, fitted], np.sqrt(rho) * np.eye(len(fitted))])
        values = np.concatenate([w * (h - changed) @ o, np.zeros((len(fitted), o.shape[1]))])
        change = np.zeros_like(o)
        change[fitted] = np.linalg.lstsq(system, values)[0]
        return float(np.mean(np.sum(g * (h @ o - changed @ (o + change)), axis=1) ** 2) / 2)

    everything = np.arange(len(o))
    for tie, scores in {"qkv": result.scores, **result.tie_scores}.items():
        assert scores is not None
        for donor in range(units):
            shared = share(dense, sharing_by_hand(dense, tie, {units: donor}))
            expected = cost(heads(layer_weights(shared, 1)), everything)
            np.testing.assert_allclose(-scores[units, donor], expected, rtol=2e-4)
    dropped = np.where(everything < len(o) // units, 0.0, h)
    assert result.drop_score is not None
    np.testing.assert_allclose(-result.drop_score[1, 0], cost(dropped, everything[len(o) // units :]), rtol=2e-4)


def inputs(model: Llama, layer: int) -> np.ndarray:
    """What a layer reads, float32 [W, T, D]."""
    x = np.asarray(model.array("embed_vd")[WINDOWS])
    for below in range(layer):
        for block in BLOCKS:
            x = np.asarray(advance(model.config, layer_weights(model, below), x, block))
    return x


def test_a_copy_is_found_whatever_its_layer() -> None:
    dense = tiny_model()
    pools = {name: np.array(getattr(dense, name)[...]) for name in ("q_pool_pdh", "k_pool_pdh", "v_pool_pdh")}
    # Unit 5 (2.1) gets the weights of unit 2 (1.0).
    for name, pool in pools.items():
        group = 2 if name[0] == "q" else 1
        pool[5 * group : 6 * group] = pool[2 * group : 3 * group]
    copied = with_params(dense, **{name: jnp.asarray(pool) for name, pool in pools.items()})
    result = match_functional(copied, WINDOWS)
    assert result.donor.ravel()[5] == 2
    assert result.value.ravel()[5] > 0.01 * result.value.ravel()[2:5].max()
    chosen = sharing_map(result, 0.2, chains="forbid")
    assert chosen.receivers.tolist() == [5]


def test_every_ratio_gives_a_map_without_chains() -> None:
    result = match_functional(tiny_model(num_hidden_layers=5), WINDOWS[:2], FunctionalSettings(span=2))
    for ratio, count in ((0.0, 0), (0.1, 1), (0.3, 3), (0.5, 5)):
        chosen = sharing_map(result, ratio, chains="forbid")
        assert len(chosen.receivers) == count
        assert chosen.match == "functional"
    with pytest.raises(HeadshareError, match="forbid"):
        sharing_map(result, 0.3)


def test_span_and_same_layer_say_who_is_tried() -> None:
    dense = tiny_model(num_hidden_layers=4)
    layer = np.arange(8) // 2
    distance = layer[:, None] - layer[None, :]
    for span, same in ((1, False), (2, False), (2, True)):
        scores = match_functional(dense, WINDOWS[:2], FunctionalSettings(span=span, same_layer=same)).scores
        assert scores is not None
        wanted = (distance <= span) & (distance >= (0 if same else 1)) & ~np.eye(8, dtype=bool)
        np.testing.assert_array_equal(np.isfinite(scores), wanted)


def test_the_prefilter_keeps_the_best_donors() -> None:
    dense = tiny_model(num_hidden_layers=4)
    everything = match_functional(dense, WINDOWS, FunctionalSettings(prefilter=8, keep=99)).scores
    filtered = match_functional(dense, WINDOWS, FunctionalSettings(prefilter=4, keep=1)).scores
    assert everything is not None
    assert filtered is not None
    tried = np.isfinite(filtered)
    best = filtered[2:].argmax(axis=1)
    np.testing.assert_allclose(filtered[2:].max(axis=1), everything[np.arange(2, 8), best], rtol=1e-3)
    assert tried.sum(axis=1).tolist() == [0, 0, 2, 2, 2, 2, 2, 2]
    first_half = match_functional(dense, WINDOWS[:4], FunctionalSettings(prefilter=4, keep=1)).scores
    assert first_half is not None
    for unit in range(2, 8):
        assert tried[unit, first_half[unit].argmax()]


@settings(max_examples=4)
@given(seed=st.integers(0, 99), block=st.sampled_from(["vo", "qk"]))
def test_what_cannot_be_seen_in_a_models_outputs_changes_no_score(seed: int, block: str) -> None:
    dense = tiny_model(seed=1)
    # A ridge pulls to the weights themselves, whose scale V and O may exchange.
    ridge = 1e-8 if block == "vo" else 0.1
    models = (dense, equivalent(dense, block, np.random.default_rng(seed)))
    scores = [
        match_functional(model, random_tokens((16, 32)), FunctionalSettings(ridge=ridge)).value[1:] for model in models
    ]
    np.testing.assert_allclose(scores[1], scores[0], rtol=2e-3)


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"span": 0}, {"ridge": 0.0}, {"prefilter": 0}, {"keep": 0}):
        with pytest.raises(HeadshareError, match="at least 1"):
            FunctionalSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(HeadshareError, match="two layers"):
        match_functional(tiny_model(num_hidden_layers=1), WINDOWS)
