"""Text that a model writes: whole windows of its likely tokens, the same by the same seed."""

import numpy as np
import pytest
from support import ALL_VARIANTS, tiny_model

from headshare_jax import HeadshareError, Sampling, generate
from headshare_jax.calibration import own_text as writing
from headshare_jax.calibration.own_text import own_text


def test_windows_go_on_from_their_beginnings_as_generation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    # The cache grows by what is missing.
    monkeypatch.setattr(writing, "_SLOTS", 16)
    greedy = own_text(model, 3, 50, beginnings=[[5, 9], [7, 1]], sampling=Sampling())
    answers = generate(model, [[5, 9], [7, 1], [5, 9]], max_new_tokens=48, stop_tokens=())
    assert greedy.tolist() == [start + answer for start, answer in zip([[5, 9], [7, 1], [5, 9]], answers, strict=True)]


def test_seeds_and_windows_differ_and_one_seed_gives_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model(), list[tuple[int, int]]()
    windows_wt = own_text(model, 5, 40, seed=3, progress=lambda done, total: seen.append((done, total)))
    assert windows_wt.shape == (5, 40)
    assert windows_wt.dtype == np.int32
    assert (windows_wt[:, 0] == model.config.bos_token_id).all()
    assert len(np.unique(windows_wt, axis=0)) == 5
    np.testing.assert_array_equal(windows_wt, own_text(model, 5, 40, seed=3))
    assert (windows_wt != own_text(model, 5, 40, seed=4)).any()
    assert seen == sorted(seen)
    assert seen[-1] == (40, 40)
    # Where fewer windows fit into memory, they are written in turns.
    monkeypatch.setattr(writing, "_CACHE_BYTES", 2 * 2 * 4 * 3 * 2 * 16 * 40)
    in_turns_wt = own_text(model, 5, 40, seed=3, progress=lambda done, total: seen.append((done, total)))
    assert in_turns_wt.shape == (5, 40)
    assert seen[-1] == (120, 120)
    assert len(np.unique(in_turns_wt, axis=0)) == 5


def test_a_text_goes_on_behind_its_end() -> None:
    model = tiny_model(eos_token_id=list(range(0, 160, 2)))
    assert own_text(model, 2, 40).shape == (2, 40)


@pytest.mark.parametrize(("count", "seq_len", "beginnings"), [(0, 8, None), (2, 1, None), (1, 8, [[1], [1, 2]])])
def test_what_cannot_be_written_is_refused(count: int, seq_len: int, beginnings: list[list[int]] | None) -> None:
    with pytest.raises(HeadshareError, match="cannot write"):
        own_text(tiny_model(), count, seq_len, beginnings=beginnings)


def test_windows_beyond_the_context_are_refused() -> None:
    with pytest.raises(HeadshareError, match="a context of 64 tokens"):
        own_text(tiny_model(), 1, 65)
    # Beyond the original context all keys would turn by other factors.
    with pytest.raises(HeadshareError, match="a context of 32 tokens"):
        own_text(tiny_model(**ALL_VARIANTS["phi3, longrope"]), 1, 33)
