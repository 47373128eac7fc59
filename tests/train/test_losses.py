"""The objective against PyTorch: next-token loss, distillation, and the four penalties."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support_torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import VARIANTS, random_tokens, sharing_by_hand, tiny_hf_model, tiny_model

from headshare_jax import Llama, SharingMap, parameters
from headshare_jax.train import losses

# Packed documents, one of a single token, and padding at the end.
SEGMENTS = np.stack([np.repeat([1, 2, 3], [9, 1, 14]), np.repeat([4, 5, 0], [3, 14, 7])]).astype(np.int32)
TOKENS = random_tokens(SEGMENTS.shape)


def params_of(model: Llama) -> dict[str, jax.Array]:
    """A model's parameters by name."""
    return {name: getattr(model, name)[...] for name in parameters.parameter_names(model.config)}


def assert_close(actual: Any, expected: Any, name: str = "") -> None:
    """Equal but for rounding, which grows with the largest of the terms, not with their sum."""
    expected = np.asarray(expected)
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-4, atol=atol, err_msg=name)


def assert_gradients(actual: dict[str, jax.Array], leaves: support_torch.Weights) -> None:
    """The gradients are those that torch has left in its leaves."""
    for name, leaf in leaves.items():
        assert_close(actual[name], np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy(), name)


@partial(jax.jit, static_argnames=("model", "settings"))
def value_and_gradients(params: dict[str, jax.Array], teacher: Any, model: Any, settings: tuple[Any, ...]) -> Any:
    """The weighted sum with its parts, and the gradients for the parameters."""

    def objective(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return losses.token_losses(
            model(params), jnp.asarray(TOKENS), jnp.asarray(SEGMENTS), teacher=teacher, **dict(settings)
        )

    return jax.value_and_grad(objective, has_aux=True)(params)


def test_only_next_tokens_of_the_same_document_are_predicted() -> None:
    expected = [
        [0 < document == after for document, after in zip(row, [*row[1:], 0], strict=True)] for row in SEGMENTS.tolist()
    ]
    assert losses.target_mask(jnp.asarray(SEGMENTS)).tolist() == expected


@pytest.mark.parametrize("variant", ["mha", "tied"])
def test_token_losses_are_those_of_torch(variant: str) -> None:
    overrides = VARIANTS[variant]
    model, teacher, hf = tiny_model(**overrides), tiny_model(seed=1, **overrides), tiny_hf_model(**overrides)
    config, leaves = model.config, support_torch.leaves(model)
    student_logits, targets = support_torch.predictions(hf, config, None, leaves, TOKENS, SEGMENTS)
    teacher_logits, _ = support_torch.predictions(hf, config, None, support_torch.leaves(teacher), TOKENS, SEGMENTS)
    nll = support_torch.next_token_loss(student_logits, targets, z_weight=1e-2)
    kl = support_torch.forward_kl(teacher_logits, student_logits, temperature=2.0)
    (0.7 * nll + 0.4 * kl).backward()
    settings = {"lm_weight": 0.7, "z_weight": 1e-2, "distill_weight": 0.4, "temperature": 2.0}
    (value, parts), grads = value_and_gradients(
        params_of(model), teacher, partial(Llama, config), tuple(settings.items())
    )
    assert value.dtype == parts.dtype == jnp.float32
    assert_close(value, (0.7 * nll + 0.4 * kl).item())
    assert_close(parts, [nll.item(), kl.item()])
    assert_gradients(grads, leaves)


def test_chunks_and_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = tiny_model(), tiny_model(seed=1)
    settings = (("distill_weight", 0.5), ("z_weight", 1e-3))
    (value, sums), grads = value_and_gradients(params_of(model), teacher, partial(Llama, model.config), settings)
    # Five positions a chunk: the last of the five chunks is not full.
    monkeypatch.setattr(losses, "HEAD_TOKENS", 5)
    for parts in (1, 2):
        settings = (("distill_weight", 0.5), ("z_weight", 1e-3), ("parts", parts))
        result, their_grads = value_and_gradients(params_of(model), teacher, partial(Llama, model.config), settings)
        assert_close(result[0], value)
        assert_close(result[1], sums)
        for name, grad in grads.items():
            assert_close(their_grads[name], grad, name)


def test_losses_alone_are_those_beside_gradients() -> None:
    model = tiny_model()
    (value, sums), _ = value_and_gradients(params_of(model), None, partial(Llama, model.config), ())
    alone = jax.jit(lambda model: losses.token_losses(model, jnp.asarray(TOKENS), jnp.asarray(SEGMENTS)))(model)
    assert_close(alone[0], value)
    assert_close(alone[1], sums)


def test_logits_of_the_whole_batch_are_never_in_memory() -> None:
    model, shape = tiny_model(vocab_size=16384, num_hidden_layers=1), (32, 128)

    def objective(params: dict[str, jax.Array], tokens_bt: jax.Array) -> jax.Array:
        return losses.token_losses(Llama(model.config, params), tokens_bt, jnp.ones_like(tokens_bt))[0]

    compiled = jax.jit(jax.grad(objective)).lower(params_of(model), jax.ShapeDtypeStruct(shape, jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * np.prod(shape) * 16384


def test_bfloat16_gradients_are_near_those_of_float32() -> None:
    model = tiny_model()
    _, exact = value_and_gradients(params_of(model), None, partial(Llama, model.config), ())
    half = partial(Llama, model.config, compute_dtype="bfloat16")
    (value, _), grads = value_and_gradients(params_of(model), None, half, ())
    assert value.dtype == jnp.float32
    for name, grad in grads.items():
        assert grad.dtype == jnp.float32
        # bfloat16 keeps eight bits, so that a product is off by up to 2^-8; errors of many products partly cancel, and
        # norms that are computed again in the backward pass are rounded once more.
        assert np.linalg.norm(grad - exact[name]) < 6 * 2**-8 * np.linalg.norm(exact[name]), name


def pairs(model: Llama, tie: str) -> SharingMap:
    """Three pairs, two of them with the same donor."""
    units = model.config.num_kv_heads
    return sharing_by_hand(model, tie, {units: 0, 2 * units - 1: 1, 2 * units: 0})


@pytest.mark.parametrize(
    ("penalty", "variant", "tie"),
    [*[(penalty, "gqa", "mixed") for penalty in losses.PENALTIES], ("norm", "mha", "qkvo"), ("js", "mha", "qkv")],
)
def test_penalties_and_their_gradients_are_those_of_torch(penalty: str, variant: str, tie: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    sharing, leaves = pairs(model, tie), support_torch.leaves(model)
    expected = support_torch.penalty(
        support_torch.hf_weights(model.config, None, leaves), model.config, sharing, penalty
    )
    expected.backward()
    value, grads = jax.value_and_grad(losses.similarity_penalty)(params_of(model), sharing, penalty)
    assert value.dtype == jnp.float32
    assert_close(value, expected.item())
    assert_gradients(grads, leaves)


# For every projection, the receivers that share it; in `mixed_sharing` these are unit 1 with qkv, unit 4 with qo.
@pytest.mark.parametrize(
    ("tie", "receivers"),
    [("qk", {"q": [2, 3, 4], "k": [2, 3, 4]}), ("mixed", {"q": [1, 4], "k": [1], "v": [1], "o": [4]})],
)
def test_norm_is_the_mean_length_of_the_difference(tie: str, receivers: dict[str, list[int]]) -> None:
    model = tiny_model()
    sharing, params, expected = pairs(model, tie), params_of(model), 0.0
    for projection, its_receivers in receivers.items():
        slices = np.asarray(params[parameters.pool_name(projection)], np.float64).reshape(model.config.num_units, -1)
        lengths = [np.linalg.norm(slices[unit] - slices[sharing.donor.flat[unit]]) for unit in its_receivers]
        expected += float(np.mean(lengths))
    value = losses.similarity_penalty(params, sharing, "norm")
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("penalty", losses.PENALTIES)
def test_equal_pairs_cost_nothing_and_stay_as_they_are(penalty: str) -> None:
    model = tiny_model()
    sharing, params = pairs(model, "kv"), params_of(model)
    for name in ("k_pool_pdh", "v_pool_pdh"):
        params[name] = params[name][sharing.donor.ravel()]
    value, grads = jax.value_and_grad(losses.similarity_penalty)(params, sharing, penalty)
    # A probability is off by a few units in its last place, so that equal distributions differ by some 1e-7.
    assert float(value) == pytest.approx(0, abs=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, np.zeros(grad.shape), atol=1e-6, err_msg=name)


@partial(jax.jit, static_argnames="penalty")
def penalty_of(receiver: jax.Array, donor: jax.Array, penalty: str) -> jax.Array:
    """The penalty of one pair of k heads."""
    sharing = SharingMap(np.zeros((2, 1), np.int32), np.full((2, 1), np.nan), heads_per_unit=1, tie="k")
    return losses.similarity_penalty({"k_pool_pdh": jnp.stack([donor, receiver])}, sharing, penalty)


HEADS = arrays(np.float32, (6, 4), elements=st.floats(-4, 4, width=32))


@pytest.mark.parametrize("penalty", losses.PENALTIES)
@given(receiver=HEADS, donor=HEADS)
def test_penalties_are_never_negative(penalty: str, receiver: np.ndarray, donor: np.ndarray) -> None:
    value = float(penalty_of(receiver, donor, penalty))
    assert np.isfinite(value)
    assert value >= -1e-6
    if np.linalg.norm(receiver - donor) > 1 and penalty in ("norm", "mse"):
        assert value > 0


@pytest.mark.parametrize("penalty", ["norm", "mse", "js"])
@given(receiver=HEADS, donor=HEADS)
def test_penalties_but_kl_are_symmetric(penalty: str, receiver: np.ndarray, donor: np.ndarray) -> None:
    forth, back = float(penalty_of(receiver, donor, penalty)), float(penalty_of(donor, receiver, penalty))
    assert forth == pytest.approx(back, rel=1e-5, abs=1e-6)


def test_kl_goes_from_the_receiver_to_the_donor() -> None:
    certain, even = np.zeros((6, 4), np.float32), np.zeros((6, 4), np.float32)
    certain[0, 0] = 30
    assert float(penalty_of(certain, even, "kl")) == pytest.approx(np.log(24), rel=1e-5)
    assert float(penalty_of(even, certain, "kl")) == pytest.approx(30 * 23 / 24 - np.log(24), rel=1e-5)


@pytest.mark.parametrize(("variant", "tie"), [("mha", "qk"), ("gqa", "qkvo")])
def test_cosine_of_the_pairs_is_that_of_their_slices(variant: str, tie: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    units = model.config.num_kv_heads
    sharing = sharing_by_hand(model, tie, {units: 0, 2 * units: 1})
    group = model.config.num_heads // units

    def vector(unit: int) -> np.ndarray:
        rows = {p: slice(unit * size, (unit + 1) * size) for p, size in zip("qkvo", (group, 1, 1, group), strict=True)}
        return np.concatenate([np.asarray(getattr(model, parameters.pool_name(p))[...])[rows[p]].ravel() for p in tie])

    expected = [
        vector(a) @ vector(b) / np.linalg.norm(vector(a)) / np.linalg.norm(vector(b))
        for a, b in ((units, 0), (2 * units, 1))
    ]
    assert float(losses.pair_cosine(params_of(model), sharing)) == pytest.approx(np.mean(expected), abs=1e-6)


def test_cosine_of_equal_pairs_is_one_and_of_zeros_none() -> None:
    model = tiny_model()
    units = model.config.num_kv_heads
    sharing = sharing_by_hand(model, "k", {units: 0})
    equal = params_of(model)
    equal["k_pool_pdh"] = equal["k_pool_pdh"].at[units].set(equal["k_pool_pdh"][0])
    assert float(losses.pair_cosine(equal, sharing)) == pytest.approx(1.0, abs=1e-6)
    equal["k_pool_pdh"] = jnp.zeros_like(equal["k_pool_pdh"])
    assert float(losses.pair_cosine(equal, sharing)) == 0.0
