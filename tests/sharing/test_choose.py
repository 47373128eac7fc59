"""Choosing receivers and donors: the published rule, and what must hold for any scores."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headshare_jax import HeadshareError, MatchResult, SharingMap, sharing_map
from headshare_jax.sharing.choose import within_shards

RATIOS = st.integers(0, 99).map(lambda percent: percent / 100)


def result_of(scores: np.ndarray, units: int, heads_per_unit: int = 1) -> MatchResult:
    """A match result from the scores of all pairs [L * U, L * U], of which those with earlier layers count."""
    layer = np.arange(len(scores)) // units
    scores = np.where(layer[:, None] > layer[None, :], scores, -np.inf).astype(np.float32)
    best = scores.argmax(axis=1)
    value = scores.max(axis=1).astype(np.float64)
    donor_layer, donor_unit = (np.where(layer == 0, -1, part) for part in (best // units, best % units))
    return MatchResult(
        donor_layer.reshape(-1, units).astype(np.int32),
        donor_unit.reshape(-1, units).astype(np.int32),
        value.reshape(-1, units),
        match="qk",
        heads_per_unit=heads_per_unit,
        scores=scores,
        source="sha256:0",
    )


@st.composite
def results(draw: st.DrawFn) -> MatchResult:
    """Scores of small models, often with ties."""
    layers, units = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.integers(-50, 50, (layers * units, layers * units)) / draw(st.sampled_from([50, 500]))
    return result_of(scores, units, draw(st.integers(1, 3)))


def feasible(result: MatchResult, ratio: float) -> int:
    """Number of receivers that the ratio stands for: its decimal digits times the units, rounded down."""
    count = int(Fraction(str(ratio)) * result.value.size)
    assume(count <= result.value[1:].size)
    return count


@pytest.mark.parametrize("percent", [10, 30, 50])
def test_maps_of_a_model_of_many_heads_follow_the_published_rule(percent: int) -> None:
    """Llama-2-7B's 32 layers of 32 units, its scores drawn at random."""
    scores = np.random.default_rng(percent).random((1024, 1024))
    chosen = sharing_map(result_of(scores, 32), percent / 100)
    best = [int(scores[unit, : unit // 32 * 32].argmax()) if unit >= 32 else unit for unit in range(1024)]
    ranked = sorted(range(32, 1024), key=lambda unit: -scores[unit, best[unit]])
    receivers, donor = set(ranked[: 1024 * percent // 100]), list(range(1024))
    for unit in receivers:
        donor[unit] = best[unit]
        while donor[unit] in receivers:
            donor[unit] = best[donor[unit]]
    assert set(chosen.receivers.tolist()) == receivers
    assert chosen.donor.ravel().tolist() == donor
    assert any(best[unit] in receivers for unit in receivers), "a chain to resolve"


def test_forbidding_chains_needs_more_than_the_best_donors() -> None:
    scores = np.random.default_rng(0).random((1024, 1024))
    only_best = replace(result_of(scores, 32), scores=None)
    chosen = sharing_map(only_best, 0.1, chains="forbid")
    np.testing.assert_array_equal(chosen.donor.ravel()[chosen.receivers], only_best.donor.ravel()[chosen.receivers])
    with pytest.raises(HeadshareError, match=r"Without chains only \d+ of 921"):
        sharing_map(only_best, 0.9, chains="forbid")


@pytest.mark.parametrize(
    ("layers", "units", "ratio", "count"), [(12, 5, 0.35, 21), (10, 10, 0.47, 47), (30, 10, 0.09, 27)]
)
def test_a_count_is_not_lost_to_rounding(layers: int, units: int, ratio: float, count: int) -> None:
    assert ratio * layers * units < count
    scores = np.random.default_rng(0).random((layers * units, layers * units))
    assert len(sharing_map(result_of(scores, units), ratio).receivers) == count


@given(result=results(), ratio=RATIOS)
def test_resolving_shares_the_units_with_the_highest_scores(result: MatchResult, ratio: float) -> None:
    count = feasible(result, ratio)
    chosen = sharing_map(result, ratio)
    value = result.value.ravel()
    assert len(chosen.receivers) == count
    if count:
        assert value[chosen.receivers].min() >= np.delete(value, chosen.receivers).max()
    for receiver in chosen.receivers:
        root = result.donor.flat[receiver]
        while root in chosen.receivers:
            root = result.donor.flat[root]
        assert chosen.donor.flat[receiver] == root
        assert chosen.score.flat[receiver] == value[receiver]


@given(result=results(), ratio=RATIOS, chains=st.sampled_from(["resolve", "forbid"]))
def test_donors_lie_in_earlier_layers_and_keep_their_weights(result: MatchResult, ratio: float, chains: str) -> None:
    feasible(result, ratio)
    try:
        chosen = sharing_map(result, ratio, chains=chains)
    except HeadshareError:
        assume(False)
    units = result.value.shape[1]
    donors = chosen.donor.ravel()[chosen.receivers]
    assert not set(donors) & set(chosen.receivers)
    assert (donors // units < chosen.receivers // units).all()
    assert not chosen.receives[0].any()
    kept = np.delete(np.arange(chosen.donor.size), chosen.receivers)
    np.testing.assert_array_equal(chosen.donor.ravel()[kept], kept)
    assert np.isnan(chosen.score.ravel()[kept]).all()


@given(result=results(), ratio=RATIOS)
def test_forbidding_chains_passes_over_a_pair_only_for_a_better_one(result: MatchResult, ratio: float) -> None:
    count = feasible(result, ratio)
    try:
        chosen = sharing_map(result, ratio, chains="forbid")
    except HeadshareError:
        assume(False)
    assert result.scores is not None
    assert len(chosen.receivers) == count
    pairs = {(receiver, chosen.donor.flat[receiver]): chosen.score.flat[receiver] for receiver in chosen.receivers}
    least = min(pairs.values(), default=np.inf)
    for receiver, donor in np.argwhere(np.isfinite(result.scores)):
        score = result.scores[receiver, donor]
        if (receiver, donor) in pairs:
            assert pairs[receiver, donor] == score
            continue
        blocking = [value for (a, b), value in pairs.items() if receiver in (a, b) or donor == a]
        assert score <= max(blocking, default=least)


@given(results(), st.data(), st.sampled_from(["resolve", "forbid"]))
def test_donors_within_shards_are_the_best_there(result: MatchResult, data: st.DataObject, chains: str) -> None:
    units = result.value.shape[1]
    shards = data.draw(st.sampled_from([count for count in range(1, units + 1) if units % count == 0]))
    local = within_shards(result, shards)
    size = units // shards
    assert result.scores is not None
    for receiver in range(result.value.size):
        place = receiver % units // size
        allowed = [donor for donor in range(result.value.size) if donor % units // size == place]
        best = max(result.scores[receiver, allowed])
        assert local.value.flat[receiver] == best
        if np.isfinite(best):
            assert result.scores[receiver, local.donor.flat[receiver]] == best
    assert not sharing_map(local, 0.1, chains=chains).crossing(shards).any()
    assert np.array_equal(within_shards(result, 1).donor, result.donor)


def test_units_that_shards_do_not_divide_are_refused() -> None:
    result = result_of(np.zeros((6, 6)), 3)
    with pytest.raises(HeadshareError, match="3 units of a layer cannot be cut evenly into 2 shards"):
        within_shards(result, 2)
    with pytest.raises(HeadshareError, match="scores of all pairs"):
        within_shards(replace(result, scores=None), 3)


@given(result=results(), tie=st.sampled_from(["q", "qk", "qkv", "qkvo", "o"]))
def test_the_map_says_how_it_was_made(result: MatchResult, tie: str) -> None:
    chosen = sharing_map(result, 0.25, tie=tie)
    assert (chosen.match, chosen.ratio, chosen.chains, chosen.tie) == ("qk", 0.25, "resolve", tie)
    assert (chosen.heads_per_unit, chosen.source) == (result.heads_per_unit, result.source)
    assert chosen.method == "direct"
    assert SharingMap.from_json(chosen.to_json()) == chosen


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(HeadshareError, match="ratio"):
        sharing_map(result_of(np.zeros((8, 8)), 2), ratio)


def test_a_ratio_beyond_what_the_first_layer_leaves_is_refused() -> None:
    result = result_of(np.random.default_rng(0).random((8, 8)), 4)
    assert len(sharing_map(result, 0.5).receivers) == 4
    with pytest.raises(HeadshareError, match="first layer never receives"):
        sharing_map(result, 0.7)


@pytest.mark.parametrize("setting", [{"chains": "follow"}, {"tie": "vq"}, {"tie": ""}, {"tie": "qkvx"}])
def test_unknown_settings_are_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(HeadshareError, match=name):
        sharing_map(result_of(np.zeros((8, 8)), 2), 0.25, **setting)
