"""Processes of one run: they agree before the first step, and none is left waiting for one that is gone."""

import json
import re
import shutil
import signal
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import support
import tiny_cli_model
from support_processes import after_step, ended, signalled, started

import headshare_jax as hs
from headshare_jax.processes.agreement import differing

RECIPE = """
model: {folder}/model
data: {{train: {folder}/train.txt, seq_len: 32}}
sharing: {{ratio: 0.5}}
stages:
  - {{kind: align, steps: 2000, learning_rate: 1.0e-3}}
batch_size: 4
compute_dtype: float32
remat: none
checkpoints: {{every: 3, keep: 2, eval_every: 1000}}
"""
GONE = re.compile(r"^headshare: (.*) is gone; the last checkpoint is of step \d+: start all .*\(--resume\)\.$", re.M)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file of a run that goes on for long."""
    monkeypatch.setenv("HEADSHARE_CACHE", str(tmp_path / "cache"))
    tiny_cli_model.saved_without_torch(tmp_path / "model")
    (tmp_path / "train.txt").write_text(topics["strings"])
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def lost(recipe: Path, number: int, what: signal.Signals, count: int = 2) -> list[str]:
    """Names of the process that is gone, as each of the others gives it within a minute, in one sentence."""
    run = recipe.with_name("run")
    processes = started(["--config", recipe, "--output", run], count)
    after_step(run, 5, processes)
    names = []
    for code, said, seconds in signalled(processes, number, what):
        assert code == 75, said
        assert seconds < 60
        last = said[said.index("headshare: ") :]
        assert last.count("\n") == 1, last
        found = GONE.match(last)
        assert found, last
        names.append(found[1])
    return names


def test_the_first_process_is_killed(recipe: Path) -> None:
    assert lost(recipe, 0, signal.SIGKILL) == ["The first process"]


@pytest.mark.slow
def test_another_process_is_killed(recipe: Path) -> None:
    assert lost(recipe, 1, signal.SIGKILL) == ["Process 1"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_stands_still(recipe: Path, number: int) -> None:
    assert lost(recipe, number, signal.SIGSTOP) == ["Process 1" if number else "The first process"]


@pytest.mark.slow
def test_one_of_four_is_killed(recipe: Path) -> None:
    assert lost(recipe, 2, signal.SIGKILL, 4) == ["Process 2"] * 3


def test_one_learning_rate_is_another(recipe: Path) -> None:
    args = ["--config", recipe, "--output", recipe.with_name("run")]
    processes = started(args, of={1: ["--set", "stages.0.learning_rate=2e-3"]})
    for code, said in ended(processes):
        assert code == 2, said
        assert said.endswith(
            "headshare: The processes do not agree: stages.0.learning_rate is 0.001 in process 0, 0.002 in process 1. "
            "Give all the same.\n"
        )
    assert not recipe.with_name("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_one_that_is_told_to_stop_stops_all_after_one_step(recipe: Path, number: int) -> None:
    run = recipe.with_name("run")
    processes = started(["--config", recipe, "--output", run])
    after_step(run, 5, processes)
    processes[number].send_signal(signal.SIGTERM)
    for code, said in ended(processes):
        assert code == 143, said
    lines = (run / "metrics.jsonl").read_text().splitlines()
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert json.loads(lines[-1])["step"] == len(lines) == newest


@pytest.mark.slow
def test_one_folder_is_another(recipe: Path) -> None:
    run, other = recipe.with_name("run"), recipe.with_name("other")
    processes = started(["--config", recipe], of={0: ["--output", run], 1: ["--output", other]})
    (first, said), (second, words) = ended(processes)
    assert (first, second) == (2, 2)
    assert "headshare: Process 1 of 2 stopped: It does not see the folder" in said
    assert f"headshare: It does not see the folder {other} of the first process" in words
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "named"), [("model", "the model's files is"), ("train.txt", "the text is")])
def test_one_file_is_another(recipe: Path, tmp_path: Path, name: str, named: str) -> None:
    # The same path on two machines, which hold something else.
    path = recipe.with_name("here.yaml")
    path.write_text(RECIPE.format(folder="."))
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "model", other / "model")
    (other / "train.txt").write_text(topics["strings"])
    if name == "model":
        hs.save(
            support.tiny_model(vocab_size=len(tiny_cli_model.ALPHABET), seed=1), other / name, to="hf", overwrite=True
        )
        tiny_cli_model.with_tokenizer(other / name)
    else:
        (other / name).write_text(topics["strings"].upper())
    args = ["--config", path, "--output", tmp_path / "run"]
    for code, said in ended(started(args, folders={0: tmp_path, 1: other})):
        assert code == 2, said
        assert f"headshare: The processes do not agree: {named}" in said
    assert not (tmp_path / "run").exists()


def test_one_process_does_not_come(recipe: Path) -> None:
    args = ["--config", recipe, "--output", recipe.with_name("run"), "--join-within", "8"]
    processes = started(args, 3)
    third = processes.pop()
    third.kill()
    third.communicate()
    (first, said), (second, words) = ended(processes)
    assert (first, second) == (75, 75)
    assert "headshare: Of 3 processes 1 did not come within 8 s (number 2); start all of them" in said
    assert re.search(r"headshare: The first process, at .*, did not let process 1 in within 8 s; start", words)


def test_what_differs_is_named_by_process() -> None:
    same = {"model": "a", "seed": "0"}
    assert differing([same, same]) == []
    assert differing([same, {**same, "seed": "1"}, same]) == ["seed is 0 in processes 0, 2, 1 in process 1"]
