"""Overlap of texts: found whole, in part and shifted, from what is kept of a text; none where there is none."""

import numpy as np
import pytest

from headshare_jax.calibration.overlap import TextRuns


def text(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 500, count)


@pytest.mark.parametrize("count", [600, 100_000])
@pytest.mark.parametrize("shift", [0, 7, 333])
def test_the_same_text_is_seen_wherever_it_is_cut(count: int, shift: int) -> None:
    runs = TextRuns.of(text(count, 0).reshape(-1, 100))
    found = runs.overlap(text(count, 0)[shift:], 128)
    assert found.seen == found.windows == (count - shift) // 128
    assert found.share == 1


def test_texts_apart_have_nothing_in_common() -> None:
    found = TextRuns.of(text(50_000, 0)).overlap(text(50_000, 1), 512)
    assert (found.windows, found.seen, found.share) == (97, 0, 0)
    assert found.sentence() == "None of the 97 windows was in the text that the model was fitted to."


def test_a_part_counts_as_a_part() -> None:
    judged = np.concatenate([text(40 * 512, 1), text(40 * 512, 0)[100 : 100 + 10 * 512], text(30 * 512, 2)])
    found = TextRuns.of(text(40 * 512, 0)).overlap(judged, 512)
    assert (found.windows, found.seen) == (80, 10)
    assert found.share == pytest.approx(10 / 80, abs=0.02)
    assert "10 of 80 windows (12 % of all runs of 32 tokens) were in the text" in found.sentence()
    assert TextRuns.of(text(40 * 512, 0)).overlap(judged, 512, max_windows=40).share == 0


def test_what_is_kept_is_little_and_comes_back_as_it_was() -> None:
    runs = TextRuns.of(text(100_000, 0))
    kept = runs.to_json()
    assert len(kept) < 22_000
    again = TextRuns.from_json(kept)
    assert again is not None
    np.testing.assert_array_equal(again.hashes, runs.hashes)
    assert TextRuns.in_provenance({"calibration": {"runs": kept}}) is not None
    for older in ({}, {"calibration": None}, {"calibration": {"name": "text"}}):
        assert TextRuns.in_provenance(older) is None
    for damaged in ("", None, "?", "AAAA", 7, [kept]):
        assert TextRuns.from_json(damaged) is None


def test_texts_too_short_for_a_run_have_nothing_in_common() -> None:
    for count in (0, 1, 31):
        assert TextRuns.of(text(count, 0)).overlap(text(count, 0), 16).share == 0
        assert TextRuns.of(text(100, 0)).overlap(text(count, 0), 16).share == 0
