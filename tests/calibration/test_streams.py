"""Calibration on several devices: the same results, each device doing its part of the work."""

import re
from math import prod

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import random_tokens, sharing_by_hand, tiny_model

from headshare_jax.calibration.fisher import attention_gradients
from headshare_jax.calibration.streams import batches, calibration_mesh, cut, layer_weights, there
from headshare_jax.fit.moments import Totals, batch_features, batch_moments
from headshare_jax.fit.refit import RefitSettings, refit
from headshare_jax.matching.functional import FunctionalSettings, batch_sums, match_functional
from headshare_jax.model.mesh import make_mesh
from headshare_jax.model.share import share

# Of these a refit holds out 3: 3 devices cannot cut every batch.
WINDOWS = random_tokens((20, 16))


@given(st.integers(0, 9), st.integers(0, 40), st.integers(1, 9), st.integers(1, 600), st.integers(1, 200))
def test_batches_are_the_windows_in_order_and_no_row_has_too_many_tokens(
    start: int, count: int, rows: int, tokens: int, seq_len: int
) -> None:
    parts = batches(slice(start, start + count), tokens, seq_len, rows)
    assert [window for part in parts for window in range(part.start, part.stop)] == list(range(start, start + count))
    sizes = [part.stop - part.start for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    for size in sizes:
        in_a_row = -(-size // rows)
        assert in_a_row == 1 or in_a_row * seq_len <= tokens


def test_gradients_and_scores_do_not_depend_on_the_devices() -> None:
    model, search = tiny_model(), FunctionalSettings(windows=20, prefilter=11, batch_tokens=40)
    found = []
    for sizes in ((1, 1, 1), (3, 1, 2)):
        mesh = make_mesh(sizes, jax.devices()[: prod(sizes)])
        with attention_gradients(model, WINDOWS, batch_tokens=40, mesh=mesh) as gradients:
            found.append((np.array(gradients), match_functional(model, WINDOWS, search, mesh=mesh)))
    (one_gradients, one), (gradients, several) = found
    np.testing.assert_allclose(gradients, one_gradients, atol=1e-5 * np.abs(one_gradients).max())
    np.testing.assert_allclose(several.scores, one.scores, rtol=1e-4)
    np.testing.assert_allclose(several.drop_score, one.drop_score, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_refit_does_not_depend_on_the_devices(sizes: tuple[int, ...]) -> None:
    model = tiny_model()
    units = model.config.num_kv_heads
    shared = share(model, sharing_by_hand(model, "qkv", {units: 0}, [2 * units]))
    settings = RefitSettings(scope="all", ridges=(0.1,), drifts=(0.5,), batch_tokens=40)
    (one, one_report), (several, report) = (
        refit(model, shared, WINDOWS, settings, mesh=mesh)
        for mesh in (calibration_mesh(jax.devices()[:1]), make_mesh(sizes, jax.devices()[: prod(sizes)]))
    )
    for block, expected in zip(report.blocks, one_report.blocks, strict=True):
        assert (block.layer, block.block, block.ridge) == (expected.layer, expected.block, expected.ridge)
        np.testing.assert_allclose(block.error_after, expected.error_after, rtol=1e-4)
    for name in ("o_pool_phd", "down_lfd"):
        weight = np.asarray(getattr(one, name)[...])
        np.testing.assert_allclose(getattr(several, name)[...], weight, atol=1e-5 * np.abs(weight).max())


def test_each_device_does_its_part_and_only_sums_move() -> None:
    model = tiny_model()

    def compiled(count: int) -> list[jax.stages.Compiled]:
        mesh = make_mesh((count, 1, 1), jax.devices()[:count])
        weights = layer_weights(model, 1, mesh)
        x_btd = cut(np.ones((16, 16, model.config.hidden_size), np.float32), mesh)
        there_b = there(slice(0, 16), mesh)
        h_bti = batch_features(model.config, weights, x_btd, "attention", mesh)
        totals = Totals.nothing(h_bti.shape[-1], x_btd.shape[-1], mesh)
        moments = batch_moments.lower(totals, weights, h_bti, *[x_btd] * 4, there_b, "attention", mesh)
        return [moments.compile(), batch_sums.lower(model.config, weights, weights, x_btd, there_b).compile()]

    for one, several in zip(compiled(1), compiled(8), strict=True):
        assert several.cost_analysis()["flops"] < 1.1 * one.cost_analysis()["flops"] / 8
        moved = set(re.findall(r"(all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", several.as_text()))
        assert moved == {"all-reduce"}
