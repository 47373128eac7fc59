"""What a run tells: the dense model beside the shared one, skipped steps, the time left, and what it lacks."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from postshare_run import ALIGN, REFIT, TIED, metrics, recipe

import headshare_jax as hs
from headshare_jax import cli, resources
from headshare_jax.convert import map_file
from headshare_jax.errors import HeadshareError
from headshare_jax.plan.footprint import footprint
from headshare_jax.train import inputs, loop, step
from headshare_jax.train import recipe as recipes
from headshare_jax.train.time_left import TimeLeft

# Functional matching on the windows that the refit takes: what the method `fitted` does.
FITTED = {"sharing": {"ratio": 0.5, "match": "functional", "refit_windows": 6}}


def test_the_dense_model_stands_beside_the_shared_one(workplace: Path, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    last = loop.run(recipe(workplace, stages=[TIED | {"steps": 3}], **FITTED), tmp_path / "run", report=told.append)
    dense, start = hs.load(workplace / "model"), map_file.read(tmp_path / "run" / "map.json")
    tokens = np.array(hs.load_tokenizer(workplace / "model")((workplace / "held-out.txt").read_text()).input_ids)
    measured = {"seq_len": 32, "max_windows": 16}
    expected = hs.perplexity(dense, tokens, **measured).token_perplexity
    unfitted = hs.perplexity(hs.share(dense, start), tokens, **measured).token_perplexity
    assert start.match == "functional"
    assert last is not None
    assert last["source_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert last["start_perplexity"] != pytest.approx(unfitted, rel=1e-5)
    assert told[0] | {"step": 0} == told[0]
    assert told[0]["source_perplexity"] == last["source_perplexity"]
    assert [line["step"] for line in metrics(tmp_path / "run") if "source_perplexity" in line] == [3]
    agreement = last["agreement"]
    assert agreement["before"] == pytest.approx(expected, rel=1e-5)
    assert agreement["after"] == pytest.approx(last["shared_perplexity"], rel=1e-4)
    assert agreement["ratio_error"] > 0
    # What was measured before training is not measured again.
    stored = json.loads((tmp_path / "run" / "baseline.json").read_text())
    assert stored == {name: last[name] for name in ("source_perplexity", "start_perplexity")}


def test_the_map_is_the_one_that_fitted_would_make(workplace: Path) -> None:
    wanted = recipe(workplace, **FITTED)
    source = hs.open_checkpoint(workplace / "model")
    windows = np.random.default_rng(0).integers(3, 250, (6, 32)).astype(np.int32)
    scores = hs.match_functional(source, windows, hs.FunctionalSettings(prefilter=6))
    expected = hs.sharing_map(scores, 0.5, chains="forbid")
    assert inputs.matched_pairs(wanted, source, windows) == expected
    with pytest.raises(HeadshareError, match="functional looks at text"):
        recipe(workplace, sharing={"match": "functional"})


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps of a stage, from 0, whose loss is made infinite."""
    wrong: set[int] = set()
    whole = step.loss_and_gradients

    def with_bad(context: Any, params: Any, frozen: Any, teacher: Any, tokens: Any, segments: Any, number: Any,
                 mesh: Any = None) -> Any:  # fmt: skip
        (loss, parts), gradients = whole(context, params, frozen, teacher, tokens, segments, number, mesh)
        bad = (number == np.array(sorted(wrong), np.int32)).any()
        return (loss / (1 - bad.astype(loss.dtype)), parts), gradients

    monkeypatch.setattr(step, "loss_and_gradients", with_bad)
    return wrong


def test_skipped_steps_are_counted(workplace: Path, tmp_path: Path, bad_steps: set[int]) -> None:
    bad_steps |= {1, 3}
    last = loop.run(recipe(workplace, stages=[TIED | {"steps": 5}]), tmp_path / "run")
    assert last is not None
    assert last["skipped_steps"] == 2
    assert [line["step"] for line in metrics(tmp_path / "run") if line["skipped"]] == [2, 4]


def test_too_many_skipped_steps_end_the_run_with_a_checkpoint(
    workplace: Path, tmp_path: Path, bad_steps: set[int]
) -> None:
    bad_steps |= {1, 3, 5}
    wild = recipe(workplace, stages=[TIED | {"steps": 7}], max_bad_steps=2, max_skipped=0.4)
    with pytest.raises(HeadshareError, match=r"2 of 4 steps, until step 4.*the checkpoint of step 4"):
        loop.run(wild, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()
    assert not (tmp_path / "run" / "final").exists()
    with pytest.raises(HeadshareError, match=r"3 of 6 steps"):
        loop.run(wild, tmp_path / "run", resume=True)
    last = loop.run(recipes.from_mapping(wild.model_dump() | {"max_skipped": 0.6}), tmp_path / "run", resume=True)
    assert last is not None
    assert (last["step"], last["skipped_steps"]) == (7, 3)


def test_the_time_left_is_told_stage_by_stage() -> None:
    clock = TimeLeft([10, 20])
    clock.enter()
    clock.step(9.0)
    assert clock.left(0, 1, [1, 2]) is None
    clock.step(1.0)
    clock.step(1.0)
    clock.pause(5.0)
    assert clock.left(0, 3, [1, 2]) == [7 * 1.0 + 5.0, 20 * 1.0 + 2 * 5.0 + 8.0]
    clock.enter()
    clock.step(9.0)
    clock.step(2.0)
    assert clock.left(1, 2, [1]) == [18 * 2.0 + 5.0]


def test_a_run_that_finds_no_room_is_refused_before_anything_is_done(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(inputs, "match")
    monkeypatch.setattr(resources, "free_memory", lambda: 10**6)
    with pytest.raises(HeadshareError, match=r"A run .* needs about .* of memory, and 1.0 MB is free; train fewer"):
        loop.run(recipe(workplace), tmp_path / "run")
    usage = resources.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda folder: usage._replace(free=10**6))
    with pytest.raises(HeadshareError, match=r"A run with 4 checkpoints of .* MB each needs about .* on the disk of"):
        loop.run(recipe(workplace), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_change_of_stage_that_finds_no_room_is_refused(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each stage trains one vector; its other parameters are there twice, but for one at a time, when it begins.
    stages = [stage | {"trainable": "final_norm_d", "distill_weight": 0.0} for stage in (ALIGN, TIED)]
    small = recipe(workplace, stages=stages)
    needed = max(stage["beginning"] for stage in footprint(small)["stages"]) * jax.local_device_count()
    monkeypatch.delattr(inputs, "match")
    monkeypatch.setattr(resources, "free_memory", lambda: needed - 1)
    with pytest.raises(HeadshareError, match=r"A run .* needs about .* of memory"):
        loop.run(small, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_command_ends_with_five_lines(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.to_yaml(recipe(workplace, stages=[TIED | {"steps": 2}], **REFIT)))
    assert cli.run(["postshare", "--config", str(path), "-o", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    lines = " ".join(printed.out.split())
    for part in (
        "3 of 6 units use another unit's qkv weights; 2 steps of training, 0 of them skipped as not finite",
        "size: files ", "quality: perplexity ", "before training ", "took ", "next: headshare chat ",
    ):  # fmt: skip
        assert part in lines
    assert "step 0: perplexity dense " in printed.err
    assert "step 2: perplexity dense " in printed.err
