"""Attention in blocks, and against it the kernels of TPUs and GPUs, interpreted or by their definition in XLA."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import random_tokens, tiny_model

from headshare_jax import Llama
from headshare_jax.model import attention
from headshare_jax.model.attention import flash_attention, has_kernel
from headshare_jax.model.kernels.cudnn import cudnn
from headshare_jax.model.kernels.splash import splash
from headshare_jax.model.mesh import batch_sharding, make_mesh
from headshare_jax.plan.topology import compile_program, topology_devices

# Three blocks of queries, for the kernels too.
LENGTH, WIDTH = 384, 32
# Two documents and padding, and one document that ends within a block of keys.
SEGMENTS = np.stack([np.repeat([1, 2, 0], [100, 220, 64]), np.repeat([1, 0], [200, 184])]).astype(np.int32)
SEGMENT_MASK = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))[None]
Heads = tuple[jax.Array, jax.Array, jax.Array]


def heads(queries: int, groups: int) -> Heads:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, LENGTH, n, WIDTH)), jnp.float32) for n in (queries, groups, groups))
    return q, k, v


def value_and_gradients(attend: Callable[..., jax.Array], of: Heads) -> tuple[jax.Array, Heads]:
    """Head outputs, and gradients of a sum that weighs each of them differently."""
    outputs, pull = jax.vjp(jax.jit(attend), *of)
    return outputs, pull(jnp.sin(jnp.arange(outputs.size, dtype=jnp.float32)).reshape(outputs.shape))


def near(window: int | None) -> np.ndarray:
    """Mask [1, T, T] of the tokens in a token's window, itself the last of them."""
    return CAUSAL if window is None else CAUSAL & ~np.tril(CAUSAL, -window)


def assert_same(got: object, expected: object, tolerance: float) -> None:
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=tolerance * float(jnp.abs(theirs).max()))


KERNELS = {
    "splash": partial(splash, interpret=True),
    "cudnn": partial(cudnn, implementation="xla"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("groups", "sizes", "window"),
    [(2, (1, 2, 2), None), (1, (2, 1, 2), None), (4, (1, 1, 1), None), (2, (1, 2, 2), 40), (2, (1, 1, 1), 129)],
)
def test_kernels_give_what_blocks_give(
    groups: int, sizes: tuple[int, int, int], window: int | None, kernel: str
) -> None:
    of = heads(4, groups)
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(sizes))])
    expected = value_and_gradients(partial(attention.attend, mask_bts=near(window) & SEGMENT_MASK, causal=True), of)
    flash = partial(flash_attention, mesh=mesh, window=window, kernel=KERNELS[kernel])
    got = value_and_gradients(lambda q, k, v: flash(q, k, v, jnp.asarray(SEGMENTS)), of)
    assert_same(got, expected, 3e-6)


def test_the_kernel_of_tpus_compiles_with_a_window() -> None:
    mesh = make_mesh((1, 4, 1), topology_devices("v5e:2x2"))
    cut = NamedSharding(mesh, PartitionSpec("fsdp"))
    of = [jax.ShapeDtypeStruct((4, 1024, n, 96), jnp.bfloat16, sharding=cut) for n in (4, 2, 2)]
    segments = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=cut)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, segments_bt: jax.Array) -> Heads:
        outputs, pull = jax.vjp(lambda *of: flash_attention(*of, segments_bt, mesh, window=300), q, k, v)
        return pull(outputs)

    program = compile_program(jax.jit(gradients).lower(*of, segments)).as_text() or ""
    assert program.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize("in_turns", [attention.rows_apart, attention.rows_in_place])
@pytest.mark.parametrize("masks", [0, 1, 2])
@pytest.mark.parametrize("window", [None, 40])
def test_rows_in_turns_give_what_all_give_together(window: int | None, masks: int, in_turns: attention.InTurns) -> None:
    of, mask_bts = heads(4, 2), CAUSAL & SEGMENT_MASK[:masks] if masks else None
    attend = partial(attention.attend, mask_bts=mask_bts, causal=True, window=window)
    expected = value_and_gradients(attend, of)
    assert_same(value_and_gradients(partial(attend, in_turns=in_turns), of), expected, 1e-6)


@pytest.mark.parametrize("given", [False, True], ids=["fixed", "given"])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("window", [1, 40, 129, LENGTH - 1, LENGTH, 2**30])
def test_blocks_see_the_tokens_of_their_windows(window: int, segments: bool, given: bool) -> None:
    of, mask_bts = heads(4, 2), SEGMENT_MASK if segments else np.ones_like(SEGMENT_MASK)
    expected = value_and_gradients(partial(attention.attend, mask_bts=near(window) & mask_bts), of)
    limits = jnp.int32(window) if given else window
    attend = partial(attention.attend, mask_bts=CAUSAL & mask_bts if segments else None, causal=True)
    assert_same(value_and_gradients(partial(attend, window=limits), of), expected, 3e-6)


def test_rows_in_turns_see_a_window_that_is_given() -> None:
    in_place = partial(attention.attend, in_turns=attention.rows_in_place)
    got = jax.jit(lambda window, *of: in_place(*of, window=window))(40, *heads(4, 2))
    assert_same(got, attention.attend(*heads(4, 2), near(40)), 1e-6)


def test_a_window_makes_attention_cost_what_the_length_does() -> None:
    def flops(length: int, window: int | None) -> float:
        of = [jax.ShapeDtypeStruct((1, length, 2, WIDTH), jnp.float32)] * 3
        attend = partial(attention.attend, window=window)
        analysis: Any = jax.jit(attend).lower(*of).compile().cost_analysis()
        return float(analysis["flops"])

    assert flops(4096, 128) < 2.1 * flops(2048, 128)
    assert flops(4096, None) > 3.5 * flops(2048, None)


def test_blocks_without_a_mask_see_what_is_not_later() -> None:
    of = heads(4, 2)
    assert LENGTH >= 2 * attention.QUERY_BLOCK
    expected = value_and_gradients(partial(attention.attend, mask_bts=CAUSAL), of)
    assert_same(value_and_gradients(partial(attention.attend, causal=True), of), expected, 1e-6)


def test_a_cpu_has_the_scores_of_one_row_in_memory() -> None:
    def temporary_bytes(in_turns: attention.InTurns | None) -> int:
        attend = partial(attention.attend, causal=True, in_turns=in_turns)
        return int(jax.jit(attend).lower(*heads(4, 2)).compile().memory_analysis().temp_size_in_bytes)

    for in_turns in (attention.rows_apart, attention.rows_in_place):
        assert temporary_bytes(in_turns) < 0.7 * temporary_bytes(None)


def test_a_model_runs_the_kernel_where_its_mesh_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=LENGTH)
    tokens, segments = jnp.asarray(random_tokens((2, LENGTH))), jnp.asarray(SEGMENTS)
    expected = model(tokens, segments_bt=segments)
    used = []

    def interpreted(*arguments: jax.Array, **settings: Any) -> jax.Array:
        used.append(True)
        return flash_attention(*arguments, kernel=KERNELS["splash"], **settings)

    monkeypatch.setattr(attention, "has_kernel", lambda *of: True)
    monkeypatch.setattr(attention, "flash_attention", interpreted)
    model.batch_sharding = batch_sharding(make_mesh((2, 1, 1), jax.devices()[:2]))
    got = jax.jit(Llama.__call__)(model, tokens, segments_bt=segments)
    assert used
    np.testing.assert_allclose(got, expected, atol=2e-5 * float(jnp.abs(expected).max()))


def test_kernels_are_for_tpus_and_whole_blocks() -> None:
    tpu = make_mesh((1, 4, 1), topology_devices("v5e:2x2"))
    assert has_kernel(tpu, 4096, 128, "bfloat16")
    assert has_kernel(tpu, 3 * attention.SPLASH_BLOCKS[-1], 64, "float32")
    assert not has_kernel(tpu, 4000, 128, "bfloat16")
    assert not has_kernel(make_mesh((1, 8, 1)), 4096, 128, "bfloat16")


@pytest.mark.parametrize(
    ("capability", "length", "width", "dtype", "there"),
    [
        ("9.0", 4096, 128, "bfloat16", True),
        ("8.6", 64, 64, "bfloat16", True),
        ("7.5", 4096, 128, "bfloat16", False),
        ("9.0", 4096, 256, "bfloat16", False),
        ("9.0", 4100, 128, "bfloat16", False),
        ("9.0", 4096, 128, "float32", False),
        ("gfx942", 4096, 128, "bfloat16", False),
    ],
)
def test_kernels_are_for_gpus_and_what_cudnn_takes(
    capability: str, length: int, width: int, dtype: str, there: bool
) -> None:
    gpu = SimpleNamespace(platform="gpu", compute_capability=capability)
    mesh = SimpleNamespace(devices=np.array([[[gpu]]]))
    assert has_kernel(cast("Mesh", mesh), length, width, dtype) is there
