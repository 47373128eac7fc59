"""The GPU's kernel for few tokens, interpreted: equal to products with copies of the matrices; where it is used."""

from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_model

from headshare_jax.model.kernels.stack import times_in_stack
from headshare_jax.model.reading import KERNEL_TOKENS, ByKernel, choose

# Sides of 48 and 80 are cut into tiles of 16; index 5 of 5 rows stands for a dropped head.
INDEX = jnp.array([3, 0, 4, 5, 3], jnp.int32)


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_same(got: jax.Array, expected: jax.Array) -> None:
    assert got.dtype == expected.dtype
    got_f32, expected_f32 = (np.asarray(each, np.float32) for each in (got, expected))
    # Sums of some 400 terms in another order.
    atol = 16 * float(jnp.finfo(got.dtype).eps) * np.abs(expected_f32).max()
    np.testing.assert_allclose(got_f32, expected_f32, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [16, 64, 80])
def test_heads_are_those_of_gathered_weights(dtype: Any, width: int) -> None:
    x, pool = normal(0, 2, 1, 48, dtype=dtype), normal(1, 5, 48, width, dtype=dtype)
    rows = pool[jnp.minimum(INDEX, 4)]
    expected = jnp.einsum("btd,ndh->btnh", x, rows, precision="highest", preferred_element_type=jnp.float32)
    got = times_in_stack(x.reshape(2, 48), pool, INDEX, side_by_side=True)
    assert_same(got.reshape(expected.shape), expected.astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [16, 64, 80])
def test_outputs_are_those_of_gathered_weights(dtype: Any, width: int) -> None:
    heads, pool = normal(0, 3, 1, 5, width, dtype=dtype), normal(1, 5, width, 48, dtype=dtype)
    rows = pool[jnp.minimum(INDEX, 4)]
    expected = jnp.einsum("btnh,nhd->btd", heads, rows, precision="highest", preferred_element_type=jnp.float32)
    got = times_in_stack(heads.reshape(3, -1), pool, INDEX, side_by_side=False)
    assert_same(got.reshape(expected.shape), expected.astype(dtype))


def test_a_product_takes_one_matrix_of_the_stack_and_weights_of_another_type() -> None:
    x, stack = normal(0, 4, 384), normal(1, 3, 384, 272, dtype=jnp.bfloat16)
    expected = jnp.matmul(x, stack[1].astype(jnp.float32), precision="highest")
    assert_same(times_in_stack(x, stack, jnp.array([1], jnp.int32), side_by_side=True), expected)


@pytest.mark.parametrize(
    ("changes", "device", "tokens", "suits"),
    [
        ({}, {"compute_capability": "9.0"}, KERNEL_TOKENS, True),
        ({}, {"compute_capability": "12.0"}, 1, True),
        ({}, {"compute_capability": "9.0"}, KERNEL_TOKENS + 1, False),
        ({}, {"compute_capability": "7.5"}, 1, False),
        ({}, {"compute_capability": "gfx942"}, 1, False),
        ({}, {}, 1, False),
        ({"intermediate_size": 88}, {"compute_capability": "9.0"}, 1, False),
        ({"head_dim": 24}, {"compute_capability": "9.0"}, 1, False),
    ],
)
def test_the_kernel_is_for_nvidia_gpus_few_tokens_and_even_sizes(
    changes: dict[str, int], device: dict[str, str], tokens: int, suits: bool
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16} | changes
    config = tiny_model(num_hidden_layers=1, **sizes).config
    gpu = cast("jax.Device", SimpleNamespace(platform="gpu", **device))
    assert isinstance(choose(config, gpu, tokens), ByKernel) is suits
