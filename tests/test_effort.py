"""What a compression is said to take before it begins."""

from dataclasses import replace

import numpy as np
import pytest
import support

import headshare_jax as hs
from headshare_jax.compression.effort import Effort
from headshare_jax.errors import HeadshareError
from headshare_jax.methods.table import METHODS
from headshare_jax.methods.work import Amount

EFFORT = Effort(
    support.tiny_model().config,
    METHODS["fitted"],
    seq_len=32,
    calibration=8,
    own=0,
    measured=16,
    amount=Amount(budget=0.7),
)


def test_only_what_is_done_costs() -> None:
    phases = ["matching", "refitting", "writing", "measuring"]
    assert list(EFFORT.costs) == phases
    assert list(replace(EFFORT, amount=None, measured=0).costs) == ["refitting", "writing"]
    assert list(replace(EFFORT, method=METHODS["direct"], calibration=0).costs) == ["matching", "writing", "measuring"]
    slim = replace(EFFORT, method=METHODS["slim"])
    assert list(slim.costs) == ["slimming", "writing", "measuring"]
    assert list(replace(EFFORT, own=24).costs) == ["writing text", *phases]


def test_twice_the_text_takes_twice_the_fit_and_its_files() -> None:
    twice = replace(EFFORT, calibration=64)
    assert twice.costs["refitting"] == 8 * EFFORT.costs["refitting"]
    assert twice.costs["matching"] == EFFORT.costs["matching"]
    assert twice.temporary == 64 / 8 * replace(EFFORT, method=METHODS["refit"], measured=0).temporary


def test_steps_of_matching_do_not_all_cost_the_same() -> None:
    parts = [EFFORT.part("matching", steps) for steps in (0.0, 1 / 3, 2 / 3, 1.0)]
    assert parts[0] == 0
    assert parts[3] == 1
    assert 0 < parts[1] < parts[2] < 1
    assert EFFORT.part("matching", 1 / 6) == pytest.approx(parts[1] / 2)
    assert replace(EFFORT, method=METHODS["direct"]).part("matching", 0.4) == 0.4


def test_slimming_costs_by_its_rounds_of_which_the_last_fits_to_all_the_text() -> None:
    short = replace(EFFORT, method=METHODS["slim"], amount=Amount(budget=0.7))
    one = replace(short, amount=Amount(budget=0.95))
    assert short.costs["slimming"] == pytest.approx(3 * one.costs["slimming"])
    # Longer texts than costs are measured on are all fitted to in the last round alone.
    long, longer = (replace(short, calibration=windows) for windows in (1000, 2000))
    added = longer.costs["slimming"] - long.costs["slimming"]
    fitting = replace(EFFORT, method=METHODS["refit"])
    assert added == pytest.approx(replace(fitting, calibration=1000).costs["refitting"])
    parts = [long.part("slimming", step / 9) for step in range(10)]
    assert parts[0] == 0
    assert parts[9] == pytest.approx(1)
    assert min(np.diff(parts)) > 0
    assert np.diff(parts).argmax() == 8
    assert short.memory > replace(short, method=METHODS["refit"]).memory


def test_a_model_that_writes_text_is_in_memory_as_a_whole_with_its_cache() -> None:
    model = support.tiny_model()
    whole, cache = 4 * hs.ledger(model).stored, model.empty_cache(24, EFFORT.seq_len).nbytes
    assert 0.9 * whole < replace(EFFORT, own=24).memory - EFFORT.memory - cache <= whole
    assert replace(EFFORT, own=10**9).memory - EFFORT.memory <= whole + 2**30


def test_work_without_room_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headshare_jax.resources.free_memory", lambda: 1000)
    with pytest.raises(HeadshareError, match=r"needs about .* of memory, and 0.0 MB is free"):
        hs.compress(support.tiny_model(), ratio=0.3, calibrate="own", calibrate_tokens=64, seq_len=32, progress=False)
