"""What is cut from heads, and units that are dropped, cost nothing when a model runs, and change no token."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ALL_VARIANTS, dropped, random_tokens, sharing_by_hand, slim_sharing, tiny_model

from headshare_jax import Conversation, Llama, Widths, generate, share, unshare
from headshare_jax.model import attention
from headshare_jax.model.kernels.cudnn import cudnn
from headshare_jax.model.kernels.splash import splash
from headshare_jax.model.mesh import make_mesh
from headshare_jax.model.reading import Gathered, OneByOne
from headshare_jax.rope import rotary_angles, rotate, rotate_queries
from headshare_jax.sharing.running import running
from headshare_jax.sharing.shapes import head_shapes

LENGTH = 40
PROMPTS = [random_tokens((n,), seed=n).tolist() for n in (5, 17, 30)]
KERNELS = {"splash": partial(splash, interpret=True), "cudnn": partial(cudnn, implementation="xla")}


def cut(x: jax.Array, kept: list[int]) -> tuple[jax.Array, jax.Array]:
    """Heads without some features, and with zeros in their place."""
    return x[..., jnp.array(kept)], jnp.zeros_like(x).at[..., jnp.array(kept)].set(x[..., jnp.array(kept)])


kept_features = st.sets(st.integers(0, 15), min_size=1).map(sorted)


@settings(max_examples=6, deadline=None)
@given(qk=kept_features, vo=kept_features, groups=st.sampled_from([1, 2, 4]), in_turns=st.sampled_from([None, *"ap"]))
def test_narrow_heads_attend_as_those_with_zeros(qk: list[int], vo: list[int], groups: int, in_turns: str) -> None:
    rng = np.random.default_rng(len(qk) + 31 * len(vo))
    q, k, v = (jnp.asarray(rng.normal(size=(2, LENGTH, n, 16)), jnp.float32) for n in (4, groups, groups))
    (q_cut, q), (k_cut, k), (v_cut, v) = cut(q, qk), cut(k, qk), cut(v, vo)
    run = {"a": attention.rows_apart, "p": attention.rows_in_place}.get(in_turns)
    narrow = attention.attend(q_cut, k_cut, v_cut, in_turns=run)
    np.testing.assert_allclose(narrow, attention.attend(q, k, v)[..., jnp.array(vo)], atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_take_heads_of_two_widths(kernel: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 128, n, width)), jnp.float32) for n, width in ((4, 24), (2, 24), (2, 8)))
    mesh, segments = make_mesh((2, 1, 2), jax.devices()[:4]), jnp.zeros((2, 128), jnp.int32)
    got = attention.flash_attention(q, k, v, segments, mesh, width=32, kernel=KERNELS[kernel])
    np.testing.assert_allclose(got, attention.attend(q, k, v), atol=3e-6)


@settings(max_examples=8, deadline=None)
@given(data=st.data(), part=st.sampled_from([0.75, 1]))
def test_heads_of_some_pairs_score_as_those_with_zeros(data: st.DataObject, part: float) -> None:
    rotary = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part}
    config = tiny_model(model_type="phi3", pad_token_id=None, rope_parameters=rotary).config
    turning, width = config.rotary_dim // 2, config.head_dim
    pairs_kp = np.array([data.draw(st.permutations(range(turning)))[:3] for _ in range(2)])
    still = np.broadcast_to(np.arange(2 * turning, width), (2, width - 2 * turning))
    columns_kh = np.concatenate([pairs_kp, turning + pairs_kp, still], axis=1)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(2, 9, n, width)), jnp.float32) for n in (4, 2))
    cos_sin = rotary_angles(config, jnp.arange(9, dtype=jnp.int32)[None])
    own = [angle[..., pairs_kp] for angle in cos_sin]

    def columns_of(x: jax.Array) -> np.ndarray:
        return np.repeat(columns_kh, x.shape[2] // 2, axis=0)[None, None]

    def zeros_elsewhere(x: jax.Array) -> jax.Array:
        mask = np.zeros((1, 1, *x.shape[2:]), np.float32)
        np.put_along_axis(mask, columns_of(x), 1, axis=-1)
        return x * mask

    def scores(q: jax.Array, k: jax.Array, angles: Any) -> jax.Array:
        turned = rotate_queries(q, *angles, head_dim=width), jnp.repeat(rotate(k, *angles), 2, axis=2)
        return jnp.einsum("btnh,bsnh->bnts", *turned)

    narrow = scores(*(jnp.take_along_axis(x, columns_of(x), axis=-1) for x in (q, k)), own)
    np.testing.assert_allclose(narrow, scores(zeros_elsewhere(q), zeros_elsewhere(k), cos_sin), atol=1e-5)


# By layer, the units that go: unequal, as many of each layer, and all of one.
DROPS = {"uneven": {0: [1, 2], 2: [0]}, "even": {0: [1], 1: [3], 2: [0]}, "a whole layer": {1: [0, 1, 2, 3], 2: [2]}}


@pytest.fixture(scope="module")
def dense() -> Llama:
    return tiny_model(num_key_value_heads=4, num_attention_heads=8, head_dim=8, attention_bias=True)


@pytest.mark.parametrize("drops", DROPS)
def test_a_dropped_unit_has_no_cache_and_changes_no_token(dense: Llama, drops: str) -> None:
    model = dropped(dense, DROPS[drops])
    whole = unshare(model)
    expected = generate(whole, PROMPTS, max_new_tokens=20)
    assert generate(model, PROMPTS, max_new_tokens=20) == expected
    assert [*Conversation(model).answer(PROMPTS[1], max_new_tokens=20)] == expected[1]
    kept = 12 - sum(map(len, DROPS[drops].values()))
    assert 12 * model.empty_cache(2, 64).nbytes == kept * whole.empty_cache(2, 64).nbytes


@pytest.mark.parametrize(("drops", "sizes"), [("uneven", (2, 2, 2)), ("even", (1, 2, 4)), ("a whole layer", (2, 1, 4))])
def test_meshes_run_layers_of_unequal_heads(dense: Llama, drops: str, sizes: tuple[int, int, int]) -> None:
    model = dropped(dense, DROPS[drops])
    spread = Llama.of(model, mesh=make_mesh(sizes))
    assert generate(spread, PROMPTS, max_new_tokens=8) == generate(model, PROMPTS, max_new_tokens=8)
    for leaf in jax.tree.leaves(spread.empty_cache(8, 64).k_lbkhs):
        assert leaf.addressable_shards[0].data.shape[-3] * sizes[2] == leaf.shape[-3]


def slim_model(kind: str, **changes: Any) -> Llama:
    dense = tiny_model(**ALL_VARIANTS[kind] | changes)
    return share(dense, slim_sharing(dense))


# Whether the cache is joined.
KINDS = [
    ("mha", False),
    ("qwen3, biases", True),
    ("phi3, partial rotary", False),
    ("smollm3, windows", True),
    ("dynamic", False),
]


@pytest.fixture
def joined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether layers that are not alike have one cache, as on a TPU, here with widths as they are."""
    asked: bool = request.param
    monkeypatch.setattr(Llama, "_on_tpu", asked)
    monkeypatch.setattr("headshare_jax.model.llama.TPU_MULTIPLE", 1)
    return asked


@pytest.mark.parametrize(("kind", "joined"), KINDS, indirect=["joined"])
def test_a_slim_model_gives_the_tokens_of_the_same_with_zeros(kind: str, joined: bool) -> None:
    slim = slim_model(kind)
    whole, shapes = unshare(slim), slim.head_shapes
    assert generate(slim, PROMPTS, max_new_tokens=20) == generate(whole, PROMPTS, max_new_tokens=20)
    (row,), cache = jnp.asarray(random_tokens((1, 40))), slim.empty_cache(1, 40)
    extend = jax.jit(Llama.extend)
    features, cache = extend(slim, row[None, :20], cache, Gathered())
    more, _ = extend(slim, row[None, 20:], cache, OneByOne())
    expected = np.asarray(jax.jit(Llama.features)(whole, row[None]))
    np.testing.assert_allclose(np.concatenate([features, more], axis=1), expected, atol=2e-6 * np.abs(expected).max())
    assert len(jax.tree.leaves(cache.k_lbkhs)) == (1 if joined else len(shapes))
    numbers = sum(shape.units * (shape.qk + shape.vo) for shape in shapes)
    assert cache.nbytes == 4 * 40 * numbers < whole.empty_cache(1, 40).nbytes
    assert running(slim.config, slim.sharing, context=40, batch=1, itemsize=4).model.cache_bytes == cache.nbytes


@pytest.mark.parametrize(("sizes", "joined"), [((2, 2, 2), True), ((1, 2, 4), False)], indirect=["joined"])
def test_meshes_run_narrow_heads(sizes: tuple[int, int, int], joined: bool) -> None:
    slim = slim_model("mha", attention_bias=True)
    spread = Llama.of(slim, mesh=make_mesh(sizes))
    assert generate(spread, PROMPTS, max_new_tokens=8) == generate(slim, PROMPTS, max_new_tokens=8)
    for leaf in jax.tree.leaves(spread.empty_cache(8, 64).k_lbkhs):
        assert math.prod(sizes) * leaf.addressable_shards[0].data.size == leaf.size


def of_one_width(dense: Llama, pairs: int, still: int, rank: int) -> Llama:
    """All units keep as many rotary pairs, columns that do not turn, and values."""
    full = Widths.full(dense.config)
    turning = dense.config.rotary_dim // 2
    kept = np.isin(np.arange(full.pairs.shape[2]), [*range(pairs), *range(turning, turning + still)])
    parts = np.split(np.broadcast_to(kept, full.pairs.shape), [turning], axis=2)
    kept_luj = np.concatenate([np.random.default_rng(0).permuted(part, axis=2) for part in parts], axis=2)
    widths = Widths(np.full_like(full.rank, rank), kept_luj, full.head_dim)
    return share(dense, replace(sharing_by_hand(dense, "qkv", {}), widths=widths))


def test_layers_of_one_width_have_one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    slim = of_one_width(tiny_model(attention_bias=True), 5, 0, 7)
    assert slim.empty_cache(2, 9).k_lbkhs.shape == (3, 2, 2, 10, 9)
    assert slim.empty_cache(2, 9).v_lbkhs.shape == (3, 2, 2, 7, 9)
    tokens = generate(slim, PROMPTS, max_new_tokens=20)
    assert tokens == generate(unshare(slim), PROMPTS, max_new_tokens=20)
    # As on a TPU, filled up to tiles.
    filled = head_shapes(slim.config, slim.sharing, multiple=4)
    assert {(shape.qk, shape.vo) for shape in filled} == {(12, 8)}
    monkeypatch.setattr(Llama, "head_shapes", filled)
    assert generate(slim, PROMPTS, max_new_tokens=20) == tokens


def test_heads_that_turn_in_part_are_filled_up_with_what_was_cut() -> None:
    slim = of_one_width(tiny_model(**ALL_VARIANTS["phi3, partial rotary"]), 4, 1, 3)
    widths = [
        [(shape.pairs, shape.still, shape.vo) for shape in head_shapes(slim.config, slim.sharing, multiple=n)]
        for n in (1, 4, 8)
    ]
    assert widths == [[(4, 1, 3)] * 3, [(5, 2, 4)] * 3, [(6, 4, 8)] * 3]
