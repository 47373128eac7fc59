"""Two processes that train together give what one gives."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import compiled
import numpy as np
import pytest
import tiny_cli_model

import headshare_jax as hs
from headshare_jax.train import loop
from headshare_jax.train import recipe as recipes

RECIPE = """
model: {folder}/model
data: {{train: {folder}/train.txt, eval: {folder}/train.txt, seq_len: 32, eval_windows: 2}}
sharing: {{ratio: 0.5, refit_windows: 16}}
stages:
  - {{kind: align, steps: 2, learning_rate: 1.0e-3}}
  - {{kind: tied, steps: 2, learning_rate: 1.0e-3}}
batch_size: 8
compute_dtype: float32
remat: none
checkpoints: {{every: 2, keep: 2, eval_every: 2}}
"""


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSHARE_CACHE", str(tmp_path / "cache"))
    tiny_cli_model.saved(tmp_path / "model")
    (tmp_path / "train.txt").write_text(topics["strings"])
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    loop.run(recipes.load(tmp_path / "recipe.yaml"), tmp_path / "one")
    outputs = together(["--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "two"), "--json"])
    for code, _, said in outputs:
        assert code == 0, said
    # One result, and nothing else: what libraries say goes to standard error.
    (_, result, _), (_, other, _) = outputs
    assert json.loads(result)["final"] == str(tmp_path / "two" / "final")
    assert other == ""
    assert "[Gloo]" in outputs[0][2]
    one, two = ([line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-5)
    last_one, last_two = (lines(tmp_path / name)[-1]["shared_perplexity"] for name in ("one", "two"))
    assert last_two == pytest.approx(last_one, rel=1e-5)
    assert hs.load(tmp_path / "two" / "final").sharing == hs.load(tmp_path / "one" / "final").sharing
    # What two began, one can go on with.
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "two" / "final")
    loop.run(recipes.load(tmp_path / "recipe.yaml"), tmp_path / "two", resume=True)
    np.testing.assert_allclose([line["loss"] for line in lines(tmp_path / "two")], one, rtol=1e-5)
    assert (tmp_path / "two" / "final").is_dir()


def lines(run: Path) -> list[dict[str, float]]:
    """All lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def together(args: list[str]) -> list[tuple[int, str, str]]:
    """Runs `headshare postshare` in two processes of four devices each; exit codes, standard output and error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": compiled.flags(4)}
    join = ["--distributed", "--coordinator", address, "--processes", "2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "headshare_jax", "postshare", *args, *join, "--process", str(number)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=600) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]
