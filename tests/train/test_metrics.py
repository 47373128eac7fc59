"""What a run writes down: lines that any reader of JSON takes, and steps whose loss stands out."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headshare_jax.train.metrics import MetricsLog, is_spike

STEADY = [4.0 + 0.1 * math.sin(step) for step in range(60)]


@pytest.mark.parametrize(
    ("before", "loss", "spike"),
    [
        (STEADY, 5.5, True),
        (STEADY, 4.3, False),
        (STEADY, 3.0, False),
        (STEADY, math.nan, False),
        (STEADY[:9], 50.0, False),
        ([math.nan, math.inf, *STEADY[:10]], 50.0, True),
        # One that came before does not hide the next.
        ([*STEADY, 50.0], 5.5, True),
        # Losses that hardly move make no spike of a hair.
        ([2.0] * 20, 2.1, False),
        ([2.0] * 20, 2.3, True),
        # What lies far back does not count.
        ([9.0] * 50 + STEADY[:50], 5.5, True),
    ],
)
def test_losses_that_stand_out_are_spikes(before: list[float], loss: float, spike: bool) -> None:
    assert is_spike(before, loss) is spike


@given(st.integers(0, 2**32 - 1))
def test_a_falling_noisy_loss_has_no_spikes(seed: int) -> None:
    noise = np.random.default_rng(seed).uniform(-0.2, 0.2, 200)
    losses = (3 + 4 * np.exp(-np.arange(200) / 40) + noise).tolist()
    assert not any(is_spike(losses[:step], losses[step]) for step in range(200))


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, from_step=0)
    log.add({"step": 1, "stage": "tied", "lm_loss": math.nan, "gradient_norm": math.inf})
    log.add({"step": 2, "stage": "tied", "lm_loss": 2.5, "gradient_norm": 1.0})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=refuse) for line in log.path.read_text().splitlines()]
    assert lines == log.lines()
    assert [line["lm_loss"] for line in lines] == [None, 2.5]
    log.draw()
    assert (tmp_path / "metrics.png").is_file()


def test_lines_after_a_step_and_broken_ones_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n[3]\n{"step": 2, "loss": 1.5}\n\xff{"ste')
    assert MetricsLog(tmp_path, from_step=1).lines() == [{"step": 1, "loss": 2.0}]
