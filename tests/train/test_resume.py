"""Runs that were stopped, killed or damaged: resumed, they are as if never interrupted, on any mesh."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from postshare_run import ALIGN, REFIT, TEXT, TIED, final_weights, losses, recipe, refitted

import headshare_jax as hs
from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.view import cast
from headshare_jax.train import loop
from headshare_jax.train import recipe as recipes


def signalled(workplace: Path, run: Path, step: int, *numbers: int) -> dict[str, Any] | None:
    """A run that gets signals after a step."""

    def report(line: dict[str, Any]) -> None:
        if line["step"] == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return loop.run(recipe(workplace), run, report=report)


def assert_as_never_interrupted(run: Path, finished: Path, workplace: Path) -> None:
    """Asserts that a run goes on to what the other one came to."""
    loop.run(recipe(workplace), run, resume=True)
    assert losses(run) == losses(finished)
    for name, value in final_weights(finished).items():
        assert np.array_equal(value, final_weights(run)[name]), name


_ALONE = """
import os, resource, signal, sys
sys.path.insert(0, {tests!r})
import conftest, jax
from pathlib import Path
from headshare_jax.train import loop, recipe

def report(line):
    if line["step"] == {step}:
        {action}

loop.run(recipe.load(Path({recipe!r})), Path({run!r}), report=report)
"""


def run_alone(workplace: Path, run: Path, step: int, action: str) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own that does something to itself after a step."""
    path = run.with_suffix(".yaml")
    path.write_text(recipes.to_yaml(recipe(workplace)))
    tests = str(Path(__file__).parents[1])
    code = _ALONE.format(tests=tests, step=step, action=action, recipe=str(path), run=str(run))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_killed_and_resumed_is_as_if_never_interrupted(finished: Path, workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_alone(workplace, run, 7, "os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
    assert_as_never_interrupted(run, finished, workplace)


def test_a_full_disk_leaves_earlier_checkpoints_to_resume_from(finished: Path, workplace: Path, tmp_path: Path) -> None:
    # Here there is none yet, so that the run begins anew.
    run = tmp_path / "run"
    # Files end there as on a full disk; metrics are smaller, a checkpoint's arrays larger.
    done = run_alone(workplace, run, 3, "resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))")
    assert done.returncode == 1
    # Threads that were writing have their say before and after.
    (error,) = re.findall(r"^headshare_jax.errors.HeadshareError: (.*)$", done.stderr, re.MULTILINE)
    assert error.startswith(f"A checkpoint in {run / 'checkpoints'} could not be written")
    assert error.endswith("earlier ones are intact.")
    assert_as_never_interrupted(run, finished, workplace)


def test_sigterm_saves_and_the_run_goes_on_exactly_and_on_another_mesh(
    finished: Path, workplace: Path, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert signalled(workplace, run, 3, signal.SIGTERM) is None
    assert (run / "checkpoints" / "3").is_dir()
    assert not (run / "final").exists()
    shutil.copytree(run, other)
    assert_as_never_interrupted(run, finished, workplace)
    loop.run(recipe(workplace, mesh={"data": 1, "fsdp": 4, "tensor": 2}), other, resume=True)
    for mine, theirs in zip(losses(other), losses(finished), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    for name, value in final_weights(finished).items():
        np.testing.assert_allclose(final_weights(other)[name], value, rtol=1e-4, atol=1e-5)


def test_ctrl_c_saves_and_a_second_one_does_not(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Where tests run in the background, a process begins with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for name, numbers in (("once", [signal.SIGINT]), ("twice", [signal.SIGINT] * 2)):
            with pytest.raises(KeyboardInterrupt):
                signalled(workplace, tmp_path / name, 3, *numbers)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Stopping after this step, with a checkpoint" in caplog.text
    assert (tmp_path / "once" / "checkpoints" / "3").is_dir()
    assert not (tmp_path / "twice" / "checkpoints" / "3").exists()


def test_steps_of_an_unusable_checkpoint_are_done_and_saved_again(
    finished: Path, workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert signalled(workplace, run, 8, signal.SIGTERM) is None
    document = run / "checkpoints" / "8" / "checkpoint.json"
    document.write_text(json.dumps({"format": "another"}))
    assert_as_never_interrupted(run, finished, workplace)
    assert "step 8 cannot be used" in caplog.text
    assert "not a checkpoint of a PostShare run" in caplog.text
    assert {"8", "9"} <= {path.name for path in (run / "checkpoints").iterdir()}


def told(short: recipes.Recipe, run: Path, *, until: str | int | None = None, resume: bool = False) -> list[str | int]:
    """The kinds of work and the steps that a run tells of, in order; it is interrupted at one of them, or never.

    What it tells of the measures before training and at the end is left out.
    """
    seen: list[str | int] = []

    def note(place: str | int) -> None:
        seen.append(place)
        if place == until:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        loop.run(
            short,
            run,
            resume=resume,
            report=lambda line: note(line["step"]),
            progress=lambda what, done, total: note(what),
        )
    return [place for place in dict.fromkeys(seen) if place and not str(place).startswith(("measuring", "comparing"))]


def test_a_run_without_a_checkpoint_begins_anew_with_its_own_map(workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = recipe(workplace, stages=[TIED | {"steps": 1, "trainable": "final_norm_d"}], **REFIT)
    assert told(short, run, until=1)[-2:] == ["refitting", 1]
    assert told(short, run, resume=True) == ["refitting", 1]
    # A tied stage begins with the refitted model.
    expected = refitted(hs.load(workplace / "model"), run)
    for name, value in final_weights(run).items():
        assert np.array_equal(value, getattr(expected, name)[...]) == (name != "final_norm_d"), name


def test_a_stage_change_with_a_refit_is_resumed_exactly(workplace: Path, tmp_path: Path) -> None:
    # What was trained and fitted in float32 is frozen then, and stays so for a model that is stored in 16 bits.
    half = tmp_path / "half"
    hs.save(cast(hs.load(workplace / "model"), "bfloat16"), half, tokenizer_from=workplace / "model")
    stages = [ALIGN | {"steps": 2}, TIED | {"steps": 2, "trainable": "q_pool_pdh, *norm*"}]
    checkpoints = {"every": 1, "eval_every": 9}
    short = recipe(workplace, model=str(half), stages=stages, checkpoints=checkpoints, **REFIT)
    loop.run(short, tmp_path / "whole")
    run = tmp_path / "run"
    assert told(short, run, until="refitting")[-3:] == [1, 2, "refitting"]
    assert told(short, run, until=4, resume=True) == ["refitting", 3, 4]
    assert told(short, run, resume=True) == [4]
    assert losses(run) == losses(tmp_path / "whole")
    for name, value in final_weights(tmp_path / "whole").items():
        assert np.array_equal(value, final_weights(run)[name]), name


def test_resuming_with_a_changed_recipe_is_refused(finished: Path, workplace: Path) -> None:
    changed = recipe(workplace, stages=[ALIGN | {"learning_rate": 1e-2}, TIED])
    with pytest.raises(HeadshareError, match=r"stages.0.learning_rate: 0.001 -> 0.01"):
        loop.run(changed, finished, resume=True)


def test_checkpoint_of_other_data_is_refused(finished: Path, workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = workplace / "train.txt"
    text.write_text(TEXT + "And one more line.\n")
    try:
        with pytest.raises(HeadshareError, match="other data"):
            loop.run(recipe(workplace), run, resume=True)
    finally:
        text.write_text(TEXT)
