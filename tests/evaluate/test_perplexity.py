"""Perplexity against a plain computation with transformers."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import logsumexp
from support import hf_logits, random_tokens, saved_hf_model, sharing_by_hand, tiny_hf_model, tiny_model

import headshare_jax
from headshare_jax import HeadshareError, Llama, perplexity, share, unshare
from headshare_jax.evaluate.perplexity import scored
from headshare_jax.model.mesh import batch_sharding, make_mesh, put

TEXT = random_tokens((103,))
SEQ_LEN = 24


def hf_losses(model: Any, window: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of every token of a window but its first, float64."""
    logits = hf_logits(model, window[None])[0, :-1].astype(np.float64)
    losses: np.ndarray = logsumexp(logits, axis=-1) - logits[np.arange(len(logits)), window[1:]]
    return losses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder: Path = tmp_path_factory.mktemp("model")
    return headshare_jax.load(saved_hf_model(folder))


def test_windows_side_by_side(model: Llama) -> None:
    theirs = tiny_hf_model()
    losses = np.concatenate([hf_losses(theirs, TEXT[start : start + SEQ_LEN]) for start in (0, 24, 48, 72)])
    result = perplexity(model, TEXT, seq_len=SEQ_LEN)
    assert result.token_perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert (result.scored_tokens, result.windows, result.total_tokens) == (4 * 23, 4, 103)
    assert (result.seq_len, result.stride, result.word_perplexity) == (24, 24, None)


@pytest.mark.parametrize("stride", [7, 23])
def test_windows_that_overlap_score_each_token_once(model: Llama, stride: int) -> None:
    theirs, scored, losses = tiny_hf_model(), 1, []
    for start in range(0, len(TEXT) - SEQ_LEN + 1, stride):
        window_losses = hf_losses(theirs, TEXT[start : start + SEQ_LEN])
        losses.append(window_losses[scored - start - 1 :])
        scored = start + SEQ_LEN
    every_loss = np.concatenate(losses)
    result = perplexity(model, TEXT, seq_len=SEQ_LEN, stride=stride)
    assert result.token_perplexity == pytest.approx(math.exp(every_loss.mean()), rel=1e-5)
    assert result.scored_tokens == len(every_loss) == scored - 1


@pytest.mark.parametrize("stride", [SEQ_LEN, 10])
def test_the_batch_size_does_not_matter(model: Llama, stride: int) -> None:
    alone, together = (
        perplexity(model, TEXT, seq_len=SEQ_LEN, stride=stride, batch_size=batch_size) for batch_size in (1, 3)
    )
    assert together.token_perplexity == pytest.approx(alone.token_perplexity, rel=1e-6)
    assert (together.scored_tokens, together.windows) == (alone.scored_tokens, alone.windows)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)])
def test_windows_run_side_by_side_on_a_mesh(model: Llama, sizes: tuple[int, ...]) -> None:
    sharing = sharing_by_hand(model, "qkv", {2: 0, 5: 1})
    for alone in (model, share(model, sharing)):
        spread = Llama.of(alone, mesh=make_mesh(sizes))
        one, many = (perplexity(each, TEXT, seq_len=SEQ_LEN, stride=10) for each in (alone, spread))
        assert many.token_perplexity == pytest.approx(one.token_perplexity, rel=1e-6)
        assert (many.scored_tokens, many.windows) == (one.scored_tokens, one.windows)


def test_devices_share_the_work() -> None:
    model, rows = tiny_model(), random_tokens((8, 64))
    flops = []
    for devices in (1, 8):
        spread = Llama.of(model, mesh=make_mesh((1, devices, 1), jax.devices()[:devices]))
        tokens = put(rows, batch_sharding(spread.mesh))
        flops.append(scored.lower(spread, tokens).compile().cost_analysis()["flops"])
    assert flops[1] < 0.2 * flops[0]


def test_word_perplexity_spreads_the_same_loss_over_words(model: Llama) -> None:
    result = perplexity(model, TEXT, seq_len=SEQ_LEN, words=40)
    assert result.word_perplexity == pytest.approx(result.token_perplexity ** (103 / 40), rel=1e-9)


def test_only_the_first_windows_are_run_if_asked(model: Llama) -> None:
    seen: list[tuple[int, int]] = []
    result = perplexity(
        model,
        TEXT,
        seq_len=SEQ_LEN,
        max_windows=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    first = perplexity(model, TEXT[: 2 * SEQ_LEN], seq_len=SEQ_LEN)
    assert result.token_perplexity == first.token_perplexity
    assert (result.windows, result.scored_tokens, result.total_tokens) == (2, 46, 103)
    assert seen == [(1, 2), (2, 2)]
    assert perplexity(model, TEXT, seq_len=SEQ_LEN, max_windows=99).windows == 4


def test_a_text_shorter_than_a_window_is_one_window(model: Llama) -> None:
    result = perplexity(model, TEXT[:10], seq_len=2048)
    losses = hf_losses(tiny_hf_model(), TEXT[:10])
    assert result.token_perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert (result.windows, result.seq_len, result.scored_tokens) == (1, 10, 9)


def test_the_protocol_is_told(model: Llama) -> None:
    plain = perplexity(model, TEXT, seq_len=SEQ_LEN).protocol
    assert "103 tokens" in plain
    assert "4 windows of 24 tokens" in plain
    assert "1 window of 24 tokens" in perplexity(model, TEXT, seq_len=SEQ_LEN, max_windows=1).protocol
    assert "92 tokens scored" in plain
    assert "a stride of 10" in perplexity(model, TEXT, seq_len=SEQ_LEN, stride=10).protocol


def test_a_shared_model_has_the_perplexity_of_its_expansion() -> None:
    dense = tiny_model()
    shared = share(dense, sharing_by_hand(dense, "qkv", {2: 0, 5: 1}))
    values = [perplexity(each, TEXT, seq_len=SEQ_LEN).token_perplexity for each in (shared, unshare(shared), dense)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] != pytest.approx(values[2], rel=1e-4)


@pytest.mark.parametrize(
    ("tokens", "settings", "reason"),
    [
        ([], {}, "two tokens"),
        ([7], {}, "two tokens"),
        ([7, 160], {}, "vocabulary of 160"),
        ([7, -1], {}, "vocabulary of 160"),
        ([7, 10**30], {}, "vocabulary of 160"),
        (TEXT, {"seq_len": 1}, "seq_len"),
        (TEXT, {"batch_size": 0}, "batch_size"),
        (TEXT, {"seq_len": 24, "stride": 25}, "stride"),
        (TEXT, {"stride": 0}, "stride"),
        (TEXT, {"max_windows": 0}, "max_windows"),
        (TEXT, {"max_windows": -1}, "max_windows"),
    ],
)
def test_what_cannot_be_measured_is_refused(model: Llama, tokens: Any, settings: dict[str, int], reason: str) -> None:
    with pytest.raises(HeadshareError, match=reason):
        perplexity(model, tokens, **settings)  # type: ignore[arg-type]
