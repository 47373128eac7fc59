"""Sliding windows: prompts, decoding and training see what one pass over the whole text sees, and cost no more."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import jax_logits, logits_in_pieces, random_tokens, tiny_model

from headshare_jax import Llama, generate, parameters
from headshare_jax.model import attention
from headshare_jax.model.attention import flash_attention
from headshare_jax.model.kernels.splash import splash
from headshare_jax.model.mesh import batch_sharding, make_mesh

WINDOW = 10
# All layers alike, and some that see all earlier tokens.
KINDS: dict[str, dict[str, Any]] = {"alike": {}, "mixed": {"full_attention_layers": (0, 2)}}
PROMPTS = [random_tokens((length,), seed=length).tolist() for length in (3, 55, 9, 1)]


def windowed(**changes: Any) -> Llama:
    model = tiny_model(eos_token_id=None)
    config = replace(model.config, family="smollm3", sliding_window=WINDOW, **changes)
    return Llama(config, {name: model.array(name) for name in parameters.parameter_names(config)})


def error(actual: Any, expected: Any) -> float:
    """Largest difference, relative to the largest expected value."""
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_depends_on_those_of_its_layers_windows(kind: str) -> None:
    model, tokens = windowed(**KINDS[kind]), random_tokens((1, 64))
    other = np.where(np.arange(64) == 20, (tokens + 1) % 160, tokens)
    (changed,) = np.nonzero(np.abs(jax_logits(model, other) - jax_logits(model, tokens)).max(axis=(0, 2)))
    # Each of three layers reaches back by a window less one.
    assert changed.tolist() == list(range(20, 20 + 3 * (WINDOW - 1) + 1 if kind == "alike" else 64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [(34, 34), (34, 11), (1, 34), (5, 7), None])
def test_prompts_and_pieces_equal_one_pass(prompts: tuple[int, int] | None, kind: str) -> None:
    model, lengths = windowed(**KINDS[kind]), prompts or (0, 0)
    rows, cache = random_tokens((2, 70)), model.empty_cache(2, slots=max(lengths) + 40)
    assert cache.k_lbkhs.shape[-1] == (WINDOW if kind == "alike" else max(lengths) + 40)
    logits, _ = logits_in_pieces(model, rows, lengths, cache, [(0, 23), (23, 24), (24, 36)])
    expected = jax_logits(model, rows)
    for row, length in enumerate(lengths):
        compared = slice(max(length - 1, 0), length + 36)
        assert error(logits[row, compared], expected[row, compared]) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_lengths_continue_as_each_alone(kind: str) -> None:
    model = windowed(**KINDS[kind])
    together = generate(model, PROMPTS, max_new_tokens=30)
    assert together == [generate(model, [prompt], max_new_tokens=30)[0] for prompt in PROMPTS]
    full = replace(model.config, sliding_window=None, full_attention_layers=())
    unlimited = Llama(full, {name: model.array(name) for name in parameters.parameter_names(full)})
    assert together != generate(unlimited, PROMPTS, max_new_tokens=30)


def test_windows_make_the_cache_short() -> None:
    def nbytes(model: Llama, slots: int) -> int:
        cache = jax.eval_shape(lambda: model.empty_cache(2, slots))
        return 2 * cache.k_lbkhs.size * cache.k_lbkhs.dtype.itemsize

    alike, mixed = (windowed(**changes) for changes in KINDS.values())
    position = 2 * 2 * 4 * 3 * alike.config.num_kv_heads * alike.config.head_dim
    assert nbytes(alike, 500) == WINDOW * position
    assert nbytes(alike, 7) == 7 * position
    assert nbytes(mixed, 500) == 500 * position


@pytest.mark.parametrize("kind", KINDS)
def test_training_runs_the_kernel_with_each_layers_window(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, length = windowed(**KINDS[kind]), 256
    tokens, segments = jnp.asarray(random_tokens((2, length))), jnp.asarray(np.repeat([[1, 2, 0]], [90, 120, 46], 1))
    segments = jnp.broadcast_to(segments, tokens.shape).astype(jnp.int32)

    def loss(params: dict[str, jax.Array], sharding: Any) -> jax.Array:
        return jnp.mean(Llama(model.config, params, batch_sharding=sharding)(tokens, segments_bt=segments) ** 2)

    params = {name: model.array(name) for name in parameters.parameter_names(model.config)}
    by_blocks = jax.jit(jax.value_and_grad(lambda params: loss(params, None)))(params)

    def interpreted(*arguments: jax.Array, **settings: Any) -> jax.Array:
        return flash_attention(*arguments, kernel=lambda *of, **how: splash(*of, **how, interpret=True), **settings)

    monkeypatch.setattr(attention, "has_kernel", lambda *of: True)
    monkeypatch.setattr(attention, "flash_attention", interpreted)
    sharding = batch_sharding(make_mesh((2, 1, 1), jax.devices()[:2]))
    by_kernel = jax.jit(jax.value_and_grad(lambda params: loss(params, sharding)))(params)
    for got, expected in zip(jax.tree.leaves(by_kernel), jax.tree.leaves(by_blocks), strict=True):
        assert error(got, np.asarray(expected)) < 1e-5
