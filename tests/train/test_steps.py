"""Steps that begin before the one before has ended: nothing that is told or kept depends on it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from postshare_run import TIED, losses, metrics, recipe

from headshare_jax import cli
from headshare_jax.errors import HeadshareError
from headshare_jax.train import loop
from headshare_jax.train import recipe as recipes
from headshare_jax.train.stage_steps import StageSteps


def test_a_step_begins_before_the_one_before_has_ended(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    begin, end = StageSteps.begin, StageSteps.end
    monkeypatch.setattr(StageSteps, "begin", lambda steps: calls.append("begin") or begin(steps))
    monkeypatch.setattr(StageSteps, "end", lambda steps: calls.append("end") or end(steps))
    rare = {"every": 100, "keep": 2, "eval_every": 100}
    loop.run(recipe(workplace, stages=[TIED | {"steps": 6}], checkpoints=rare), tmp_path / "run")
    # Of the first step it is not known yet whether it is bad; the last is evaluated and saved.
    assert calls == ["begin", "end", *["begin", "begin", "end", "begin", "end", "begin", "end", "begin", "end", "end"]]


def test_a_run_that_is_told_to_stop_ends_with_the_step_that_runs(
    finished: Path, workplace: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def report(line: dict[str, Any]) -> None:
        if line["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    assert loop.run(recipe(workplace), run, report=report) is None
    assert losses(run) == losses(finished)[:8]
    assert (run / "checkpoints" / "8").is_dir()


def test_the_share_of_the_time_in_steps_is_told(workplace: Path, tmp_path: Path) -> None:
    last = loop.run(recipe(workplace, stages=[TIED]), tmp_path / "run")
    assert last is not None
    lines = metrics(tmp_path / "run")
    assert all(0 < line["goodput"] < 1 for line in lines)
    assert 0 < last["goodput"] < lines[-1]["goodput"]
    # What this machine can do is not published.
    assert all(line["of_measured_rate"] > 0 and "mfu" not in line for line in lines)


def test_three_steps_are_traced(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, path = tmp_path / "run", tmp_path / "recipe.yaml"
    path.write_text(recipes.to_yaml(recipe(workplace, stages=[TIED])))
    args = ["postshare", "--config", str(path), "--output", str(run), "--profile"]
    assert cli.run([*args, "3"]) == 2
    assert "Steps 3 to 5 are to be traced; the run does 1 to 4; name others (--profile)." in capsys.readouterr().err
    assert not run.exists()
    # The profiler of a process that other libraries were loaded into, as PyTorch is here, can crash it.
    subprocess.run([sys.executable, "-m", "headshare_jax", *args, "2"], check=True, capture_output=True)
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1
    assert len(metrics(run)) == 4


def test_weights_and_biases_needs_its_package(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headshare_jax.train.metrics.find_spec", lambda name: None)
    with pytest.raises(HeadshareError, match=r"pip install 'headshare-jax\[wandb\]'"):
        loop.run(recipe(workplace), tmp_path / "run", wandb="project")
    assert not (tmp_path / "run").exists()


def test_weights_and_biases_gets_the_metrics(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loop.run(recipe(workplace, stages=[TIED]), tmp_path / "run", wandb="project")
    assert len(list((tmp_path / "run" / "wandb").rglob("*.wandb"))) == 1
