"""Cutting values and outputs: what is kept whole is unchanged, and balanced factors are what they are said to be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ALL_VARIANTS, tiny_model

from headshare_jax import HeadshareError
from headshare_jax.parameters import bias_name, pool_name
from headshare_jax.sharing.view import CastView
from headshare_jax.slim.cut import Directions, ValuePath, balance, balanced, cut


def directions_of(path: ValuePath, seed: int = 0) -> Directions:
    units, width = path.v_kdh.shape[0], path.v_kdh.shape[2]
    into_uhh = np.random.default_rng(seed).normal(size=(units, width, width))
    return Directions(into_uhh, np.linalg.inv(into_uhh))


@settings(max_examples=30, deadline=None)
@given(inputs=st.integers(6, 20), rank=st.integers(1, 6), alike=st.booleans(), seed=st.integers(0, 999))
def test_balanced_factors_have_the_same_product_and_equal_gram_matrices(
    inputs: int, rank: int, alike: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    v_dr, o_re = 30 * rng.normal(size=(inputs, rank)), rng.normal(size=(rank, 15))
    if alike:
        v_dr[:, -1] = v_dr[:, 0]
    v, o = balanced(v_dr, o_re)
    np.testing.assert_allclose(v @ o, v_dr @ o_re, atol=1e-10)
    gram = v.T @ v
    np.testing.assert_allclose(gram, o @ o.T, atol=1e-10)
    np.testing.assert_allclose(gram, np.diag(np.sort(np.diag(gram))[::-1]), atol=1e-10)


@pytest.mark.parametrize("name", ["mha", "gqa", "qwen2", "phi3, partial rotary"])
def test_all_directions_change_nothing(name: str) -> None:
    model = tiny_model(**ALL_VARIANTS[name])
    path = ValuePath.read(model, 1)
    units, _, width = path.v_kdh.shape
    whole = cut(path, directions_of(path), np.full(units, width))
    np.testing.assert_allclose(whole.v_kdh @ whole.o_khe, path.v_kdh @ path.o_khe, atol=1e-12)
    assert not np.allclose(whole.v_kdh, path.v_kdh)
    assert path.biased == ("v_bias_ph" in ValuePath.read(model, 1).slices(model, 1) or name == "qwen2")


@pytest.mark.parametrize("name", ["gqa", "attention bias"])
def test_a_cut_is_the_projection_on_its_directions(name: str) -> None:
    model = tiny_model(**ALL_VARIANTS[name])
    path = ValuePath.read(model, 0)
    directions = directions_of(path)
    slim = cut(path, directions, np.array([3, -1]))
    projection = directions.into_uhh[0][:, :3] @ directions.back_uhh[0][:3]
    np.testing.assert_allclose(slim.v_kdh[0] @ slim.o_khe[0], path.v_kdh[0] @ projection @ path.o_khe[0], atol=1e-12)
    assert not slim.v_kdh[0, :, 3:].any()
    assert not slim.o_khe[0, 3:].any()
    np.testing.assert_array_equal(slim.v_kdh[1], path.v_kdh[1])
    np.testing.assert_array_equal(slim.o_khe[1], path.o_khe[1])
    again = balance(slim, np.array([3, -1]))
    np.testing.assert_allclose(again.v_kdh @ again.o_khe, slim.v_kdh @ slim.o_khe, atol=1e-12)


@pytest.mark.parametrize("name", ["gqa", "attention bias"])
def test_what_is_not_cut_is_written_back_bit_for_bit(name: str) -> None:
    model = tiny_model(dtype="bfloat16", **ALL_VARIANTS[name])
    slices = ValuePath.read(model, 2).slices(model, 2)
    names = [pool_name("v"), pool_name("o"), *([bias_name("v")] if name != "gqa" else [])]
    assert list(slices) == [(each, 2) for each in names]
    for (each, layer), values in slices.items():
        assert values.dtype == model.dtype(each)
        np.testing.assert_array_equal(values, model.read(each, layer))


def test_weights_too_large_for_their_type_are_refused() -> None:
    model = CastView(tiny_model(), "float16")
    path = ValuePath.read(model, 0)
    large = ValuePath(1e6 * path.v_kdh, path.o_khe, path.heads, path.biased)
    with pytest.raises(HeadshareError, match="v_pool_pdh of layer 0 does not fit float16"):
        large.slices(model, 0)
