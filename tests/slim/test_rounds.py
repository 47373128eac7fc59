"""Slimming whole models: budgets, families, what is unchanged, stops, and what is refused."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ALL_VARIANTS, random_tokens, sharing_by_hand, tiny_model

import headshare_jax as hs
from headshare_jax import HeadshareError, parameters
from headshare_jax.fit.moments import batch_moments
from headshare_jax.sharing.view import SharedView
from headshare_jax.sharing.widths import Widths
from headshare_jax.slim.choose import Rules
from headshare_jax.slim.costs import _moments
from headshare_jax.slim.cut import ValuePath
from headshare_jax.slim.rounds import SlimSettings, round_targets, slim

WINDOWS = random_tokens((8, 32))
FAMILIES = ["gqa", "attention bias", "qwen3, biases"]
SLOW_FAMILIES = ["mha", "qwen2, windows", "phi3, partial rotary", "smollm3, windows"]


def widths_of(sharing: hs.SharingMap) -> Widths:
    assert sharing.widths is not None
    return sharing.widths


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FAMILIES)])
def test_a_slim_model_keeps_its_budget_and_its_map_says_what(name: str) -> None:
    dense = tiny_model(**ALL_VARIANTS[name])
    config = dense.config
    model, sharing, report = slim(dense, WINDOWS, 0.75, SlimSettings(scoring_tokens=256, round_tokens=256))
    assert (sharing.method, sharing.budget, sharing.source) == ("slim", 0.75, hs.fingerprint(dense))
    assert model.sharing == sharing
    sharing.check_model(config)
    widths = widths_of(sharing)
    kept_lu = widths.rank + widths.qk.sum(axis=2)
    left = int(0.75 * config.num_units * 2 * config.head_dim) - int(kept_lu[~sharing.dropped].sum())
    # Where columns go in twos one may be left over, and more where a unit goes and none may have them back.
    assert 0 <= left <= (2 * config.head_dim - 1 if sharing.dropped.any() else 1)
    changed = sharing.dropped | sharing.slim
    assert (sharing.score[changed] <= 0).all()
    assert np.isnan(sharing.score[~changed]).all()
    assert len(report.blocks) > 0
    for layer in range(config.num_layers):
        for projection in "qkvo":
            heads = np.asarray(model.read(parameters.pool_name(projection), layer), np.float32)
            per_unit = heads.reshape(config.num_kv_heads, -1, *heads.shape[1:])
            columns_unhd = per_unit if projection == "o" else per_unit.swapaxes(2, 3)
            kept_uh = widths.kept(projection)[layer] & ~sharing.dropped[layer][:, None]
            assert ((columns_unhd != 0).any(axis=(1, 3)) == kept_uh).all()
    assert widths.pairs.all() or not config.qk_norm


def test_values_and_outputs_of_slim_units_are_balanced() -> None:
    model, sharing, _ = slim(tiny_model(), WINDOWS, 0.8, SlimSettings(scoring_tokens=256))
    rank_lu = widths_of(sharing).rank
    cut = np.argwhere((rank_lu < 16) & ~sharing.dropped).tolist()
    assert cut
    for layer, unit in cut:
        path, rank = ValuePath.read(model, layer), rank_lu[layer, unit]
        v_dr, o_re = path.v_kdh[unit][:, :rank], path.o_khe[unit][:rank]
        gram = v_dr.T @ v_dr
        np.testing.assert_allclose(gram, o_re @ o_re.T, atol=1e-5 * gram.max())
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5 * gram.max())


def test_the_whole_of_attention_is_the_dense_model() -> None:
    dense = tiny_model()
    model, sharing, _ = slim(dense, WINDOWS, 1.0)
    assert sharing.widths is None
    assert not sharing.dropped.any()
    for name in parameters.layered_names(dense.config):
        for layer in range(dense.config.num_layers):
            np.testing.assert_array_equal(model.read(name, layer), dense.read(name, layer))


def test_slim_is_closer_to_the_dense_model_than_dropped_units_are() -> None:
    dense, held = tiny_model(num_hidden_layers=4), random_tokens((8, 32), seed=1)
    found, _, _ = slim(dense, WINDOWS, 0.75)
    scores = hs.match_functional(dense, WINDOWS)
    dropped, _ = hs.refit(dense, SharedView(dense, hs.drop_map(scores, 0.25)), WINDOWS)
    assert hs.agreement(dense, found, held).kl < 0.8 * hs.agreement(dense, dropped, held).kl


def test_nothing_is_compiled_again_from_round_to_round() -> None:
    dense, settings = tiny_model(hidden_size=48), SlimSettings(scoring_tokens=256, round_tokens=256)
    slim(dense, WINDOWS, 0.9, settings)
    before = _moments._cache_size(), batch_moments._cache_size()
    slim(dense, WINDOWS, 0.7, settings)
    assert (_moments._cache_size(), batch_moments._cache_size()) == before


class StopError(Exception):
    """In place of a kill."""


class Stopping:
    """Journals that stop the work once so many steps were written."""

    def __init__(self, journals: hs.JournalFolder, steps: int):
        self.journals, self.left = journals, steps

    def of(self, work: str, key: Mapping[str, Any]) -> "_StoppingJournal":
        return _StoppingJournal(self, self.journals.of(work, key))


class _StoppingJournal:
    def __init__(self, stopping: Stopping, journal: Any):
        self.stopping, self.journal = stopping, journal

    def read(self, step: str) -> dict[str, np.ndarray] | None:
        found: dict[str, np.ndarray] | None = self.journal.read(step)
        return found

    def write(self, step: str, arrays: Mapping[str, np.ndarray]) -> None:
        if self.stopping.left == 0:
            raise StopError
        self.stopping.left -= 1
        self.journal.write(step, arrays)


@pytest.mark.parametrize("steps", [0, 2, 4])
def test_what_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, steps: int) -> None:
    dense, settings = tiny_model(**ALL_VARIANTS["attention bias"]), SlimSettings(scoring_tokens=256, round_tokens=256)
    expected, expected_map, expected_report = slim(dense, WINDOWS, 0.8, settings)
    journals = hs.JournalFolder(tmp_path)
    with pytest.raises(StopError):
        slim(dense, WINDOWS, 0.8, settings, journals=Stopping(journals, steps))
    told: list[tuple[int, int]] = []
    model, sharing, report = slim(
        dense, WINDOWS, 0.8, settings, journals=journals, progress=lambda done, total: told.append((done, total))
    )
    assert (sharing, report) == (expected_map, expected_report)
    for name in parameters.layered_names(dense.config):
        for layer in range(dense.config.num_layers):
            np.testing.assert_array_equal(model.read(name, layer), expected.read(name, layer))
    assert told[-1] == (18, 18)
    assert all(before < after for before, after in pairwise(done for done, _ in told))


def test_a_smaller_budget_goes_on_from_the_rounds_of_a_larger_one(tmp_path: Path) -> None:
    dense, settings = tiny_model(), SlimSettings(scoring_tokens=64, round_tokens=128)
    expected, expected_map, _ = slim(dense, WINDOWS, 0.8, settings)
    journals = hs.JournalFolder(tmp_path)
    slim(dense, WINDOWS, 0.9, settings, journals=journals)
    told: list[int] = []
    model, sharing, _ = slim(
        dense, WINDOWS, 0.8, settings, journals=journals, progress=lambda done, total: told.append(done)
    )
    # Costs of the first round are there.
    assert told[0] == 7
    assert sharing == expected_map
    for layer in range(dense.config.num_layers):
        np.testing.assert_array_equal(model.read("o_pool_phd", layer), expected.read("o_pool_phd", layer))


@pytest.mark.parametrize(
    ("budget", "expected"), [(1.0, [1.0]), (0.95, [0.95]), (0.9, [0.9]), (0.75, [0.9, 0.8, 0.75]), (0.8, [0.9, 0.8])]
)
def test_each_round_takes_another_tenth(budget: float, expected: list[float]) -> None:
    assert round_targets(budget) == expected


@pytest.mark.parametrize(
    ("budget", "settings", "words"),
    [(0.0, {}, "budget must be above 0"), (0.02, {"rules": Rules(even="model")}, "keep more")],
)
def test_budgets_that_cannot_be_met_are_refused(budget: float, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(HeadshareError, match=words):
        slim(tiny_model(), WINDOWS[:2], budget, SlimSettings(scoring_tokens=32, round_tokens=64, **settings))


def test_wrong_models_texts_and_settings_are_refused() -> None:
    dense = tiny_model()
    shared = SharedView(dense, sharing_by_hand(dense, "qkv", {2: 0}))
    with pytest.raises(HeadshareError, match="Only a dense model"):
        slim(shared, WINDOWS, 0.8)
    with pytest.raises(HeadshareError, match="at least two windows"):
        slim(dense, WINDOWS[:1], 0.8)
    with pytest.raises(HeadshareError, match="scoring_tokens must be at least 1"):
        SlimSettings(scoring_tokens=0)
    with pytest.raises(HeadshareError, match="round_tokens must be a whole number"):
        SlimSettings(round_tokens=0.5)  # type: ignore[arg-type]
