"""Published results, where they are: a small model's donors, scores and logits, and the pairs of Llama-2-7B."""

from pathlib import Path

import numpy as np
import pytest
from support import jax_logits

import headshare_jax as hs
from headshare_jax import HeadshareError, MatchResult, match, share, sharing_map
from headshare_jax.matching.cosine import MATCH_FUNCTIONS

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
TINY_MHA = REFERENCE / "tiny-mha"
WEIGHTED = tuple(name for name in MATCH_FUNCTIONS if name != "random")


@pytest.mark.parametrize("function", WEIGHTED)
def test_donors_and_scores(function: str) -> None:
    expected = np.load(TINY_MHA / "expected.npz")
    result = match(hs.open_checkpoint(TINY_MHA), function)
    np.testing.assert_array_equal(result.donor_layer[1:], expected[f"{function}_donor_layer"])
    np.testing.assert_array_equal(result.donor_unit[1:], expected[f"{function}_donor_head"])
    np.testing.assert_allclose(result.value[1:], expected[f"{function}_value"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tie", ["qkv", "qkvo"])
def test_logits_of_a_shared_model(tie: str) -> None:
    expected = np.load(TINY_MHA / "expected.npz")
    model = hs.load(TINY_MHA)
    chosen = sharing_map(match(model, "qk"), 0.3, tie=tie)
    tokens = expected["input_ids"].astype(np.int32)
    np.testing.assert_array_equal(chosen.donor, expected["donor_root_30"])
    np.testing.assert_allclose(jax_logits(model, tokens), expected["dense_logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(
        jax_logits(share(model, chosen), tokens), expected[f"logits_30_{tie}"], atol=1e-4, rtol=0
    )


def load_llama_2() -> tuple[MatchResult, dict[str, np.ndarray]]:
    stored = dict(np.load(REFERENCE / "llama-2-7b" / "match_qk.npz"))
    # The published arrays begin with layer 1.
    first = np.full((1, stored["value"].shape[1]), -1, np.int32)
    result = MatchResult(
        np.concatenate([first, stored["donor_layer"]]),
        np.concatenate([first, stored["donor_head"]]),
        np.concatenate([np.full(first.shape, -np.inf), stored["value"]]),
        match="qk",
    )
    return result, stored


@pytest.mark.parametrize("percent", [10, 30, 50])
def test_maps_of_llama_2(percent: int) -> None:
    result, stored = load_llama_2()
    chosen = sharing_map(result, percent / 100)
    assert set(chosen.receivers) == set(stored[f"receivers_{percent}"])
    np.testing.assert_array_equal(chosen.donor, stored[f"donor_root_{percent}"])


def test_most_published_donors_at_30_percent_are_receivers_themselves() -> None:
    result, _ = load_llama_2()
    chosen = sharing_map(result, 0.3)
    best = result.donor.ravel()[chosen.receivers]
    assert len(chosen.receivers) == 307
    assert np.isin(best, chosen.receivers).sum() == 163


def test_llama_2_without_chains() -> None:
    result, _ = load_llama_2()
    chosen = sharing_map(result, 0.1, chains="forbid")
    np.testing.assert_array_equal(chosen.donor.ravel()[chosen.receivers], result.donor.ravel()[chosen.receivers])
    with pytest.raises(HeadshareError, match=r"Without chains only \d+ of 921"):
        sharing_map(result, 0.9, chains="forbid")
