"""PostShare runs: stages, what is written, what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from postshare_run import ALIGN, REFIT, TIED, final_weights, metrics, recipe, refitted

import headshare_jax as hs
from headshare_jax import cli
from headshare_jax.convert import map_file, tokenizer
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import parameter_names
from headshare_jax.plan.footprint import footprint
from headshare_jax.train import inputs, loop
from headshare_jax.train import recipe as recipes


def test_a_tied_stage_begins_with_a_shared_models_weights(workplace: Path, tmp_path: Path) -> None:
    dense = hs.load(workplace / "model")
    sharing = hs.sharing_map(hs.match(dense, "v"), 0.5, tie="qk")
    start = hs.share(dense, sharing)
    start.o_pool_phd[...] = start.o_pool_phd[...] * 1.5
    hs.save(start, tmp_path / "start")
    frozen = TIED | {"steps": 1, "trainable": "final_norm_d", "learning_rate": 1e-3}
    begun = {"sharing": {"start": str(tmp_path / "start")}}
    loop.run(recipe(workplace, stages=[frozen], **begun), tmp_path / "run")
    assert map_file.read(tmp_path / "run" / "map.json") == sharing
    final = final_weights(tmp_path / "run")
    for name in parameter_names(start.config):
        assert np.array_equal(final[name], np.asarray(getattr(start, name)[...])) == (name != "final_norm_d"), name
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sharing": {"start": str(workplace / "model")}, "stages": [TIED]}, "shares nothing"),
        (begun, "first stage is align"),
        ({"sharing": {"start": "a", "map": "b"}, "stages": [TIED]}, "leave sharing.map out"),
    ]
    for changes, message in wrong:
        with pytest.raises(HeadshareError, match=message):
            loop.run(recipe(workplace, **changes), tmp_path / "other")
    assert not (tmp_path / "other").exists()


# The checkpoint is read back as it lies, without the run's mesh, which is what Orbax warns of.
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_that_ends_with_align_exports_the_refitted_model(workplace: Path, tmp_path: Path) -> None:
    run, short = tmp_path / "run", recipe(workplace, stages=[ALIGN | {"steps": 2}], **REFIT)
    last = loop.run(short, run)
    # Beneath the view that shares it, a checkpoint of an align stage is the dense model.
    aligned = hs.load(hs.open_checkpoint(run).base.base)
    final, dense = hs.load(run / "final"), hs.load(workplace / "model")
    assert not np.array_equal(aligned.o_pool_phd[...], dense.o_pool_phd[...])
    expected = refitted(aligned, run)
    for name, value in final_weights(run).items():
        assert np.array_equal(value, getattr(expected, name)[...]), name
    report = json.loads((run / "refit.json").read_text())
    assert report["windows"] == 6
    assert any(block["held_out_after"] < block["held_out_before"] for block in report["blocks"])
    tokens = tokenizer.load(run / "final")((workplace / "held-out.txt").read_text()).input_ids
    (line,) = [line for line in metrics(run) if "shared_perplexity" in line]
    found = hs.perplexity(final, np.array(tokens), seq_len=32, max_windows=16).token_perplexity
    assert last is not None
    assert last["shared_perplexity"] == pytest.approx(found, rel=1e-5)
    assert last["shared_perplexity"] != line["shared_perplexity"]


def test_run_folder_holds_what_is_promised(finished: Path, workplace: Path) -> None:
    assert recipes.load(finished / "config.yaml") == recipe(workplace)
    lines = metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, 10))
    cosines = [line["pair_cosine"] for line in lines if "pair_cosine" in line]
    assert len(cosines) == 2
    assert -1 < cosines[0] < cosines[1] < 1
    assert [line["step"] for line in lines if "shared_perplexity" in line] == [3, 5, 6, 9]
    assert (finished / "metrics.png").read_bytes().startswith(b"\x89PNG")
    steps = sorted(int(path.name) for path in (finished / "checkpoints").iterdir())
    best = min((line["shared_perplexity"], line["step"]) for line in lines if "shared_perplexity" in line)[1]
    assert steps == sorted({8, 9, best} if best % 2 == 0 or best in (5, 9) else {8, 9})


def test_the_guide_names_every_metric(finished: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "postshare.md").read_text()
    table = guide.split("| key | what it is |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.partition(" | ")[0])}
    # The rate of what tests run on is not published.
    assert named - {"mfu"} == {name for line in metrics(finished) for name in line}


def test_final_model_is_shared_by_the_runs_map(finished: Path) -> None:
    checkpoint = hs.open_checkpoint(finished / "final")
    assert checkpoint.sharing == map_file.read(finished / "map.json")
    assert checkpoint.sharing is not None
    assert len(checkpoint.sharing.receivers) == 3
    sizes = hs.ledger(hs.load(finished / "final"))
    assert sizes.dense - sizes.stored == sizes.nominal_saving
    assert cli.run(["generate", str(finished / "final"), "--prompt", "The", "--max-new-tokens", "2"]) == 0


def test_training_helps(finished: Path, workplace: Path) -> None:
    lines = metrics(finished)
    assert lines[4]["sim_loss"] < lines[0]["sim_loss"]
    assert lines[8]["lm_loss"] < lines[5]["lm_loss"] < lines[0]["lm_loss"]
    assert lines[8]["shared_perplexity"] < lines[4]["shared_perplexity"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": {"fsdp": 16}}, "16 devices"),
        ({"mesh": {"fsdp": 3}}, "3 devices"),
        ({"batch_size": 12}, "multiple"),
        ({"data": {"train": "absent.txt", "seq_len": 32}}, "no file absent.txt"),
        ({"sharing": {"ratio": 0.0}}, "no receivers"),
        ({"sharing": {"map": "absent.json"}}, "absent.json"),
        (
            {"sharing": {"refit_windows": 305}},
            r"refit_windows \(305\) takes 305 blocks of .*, which has 304;",
        ),
        ({"stages": [ALIGN | {"trainable": "nothing"}]}, "nothing"),
    ],
)
def test_impossible_runs_are_refused(workplace: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    refused(recipe(workplace, **changes), said, tmp_path)


def test_text_shorter_than_a_block_is_refused_before_matching(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(inputs, "match")
    (tmp_path / "short.txt").write_text("Short.")
    refused(recipe(workplace, data={"train": str(tmp_path / "short.txt"), "seq_len": 32}), "seq_len", tmp_path)


def refused(impossible: recipes.Recipe, said: str, folder: Path) -> None:
    """Asserts that a run and its plan are refused, and that nothing is left that would block a corrected run."""
    before = list(folder.iterdir())
    with pytest.raises(HeadshareError, match=said):
        loop.run(impossible, folder / "run")
    with pytest.raises(HeadshareError, match=said):
        footprint(impossible)
    assert list(folder.iterdir()) == before


def test_a_run_does_not_write_over_another(finished: Path, workplace: Path) -> None:
    with pytest.raises(HeadshareError, match="holds a run already; resume it"):
        loop.run(recipe(workplace), finished)
    with pytest.raises(HeadshareError, match="no run to resume"):
        loop.run(recipe(workplace), workplace / "never", resume=True)
    with pytest.raises(HeadshareError, match="exists already; choose another folder"):
        loop.run(recipe(workplace), workplace / "model")
    with pytest.raises(HeadshareError, match="create it first"):
        loop.run(recipe(workplace), workplace / "never" / "run")


def test_losses_that_stay_infinite_end_the_run(workplace: Path, tmp_path: Path) -> None:
    wild = recipe(workplace, stages=[TIED | {"steps": 30, "learning_rate": 1e30}], max_bad_steps=3)
    with pytest.raises(HeadshareError, match="3 steps in a row"):
        loop.run(wild, tmp_path / "run")


def test_frozen_parameters_stay_as_they_were(workplace: Path, tmp_path: Path) -> None:
    only = recipe(workplace, stages=[TIED | {"steps": 2, "trainable": "attention"}])
    loop.run(only, tmp_path / "run")
    before, after = hs.load(workplace / "model"), hs.load(tmp_path / "run" / "final")
    assert np.array_equal(before.gate_ldf[...], after.gate_ldf[...])
    assert not np.array_equal(before.o_pool_phd[...], after.o_pool_phd[...])


def test_postshare_command(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.to_yaml(recipe(workplace)))
    args = [
        "postshare",
        "--config",
        str(path),
        "-o",
        str(tmp_path / "run"),
        "--set",
        "sharing.refit_windows=304",
        "stages.0.steps=1",
        "stages.1.steps=1",
        "stages.1.distill_weight=1.0",
    ]
    assert cli.run([*args, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [stage["kind"] for stage in planned["stages"]] == ["align", "tied"]
    assert planned["recipe"]["stages"][0]["steps"] == 1
    assert planned["recipe"]["sharing"]["refit_windows"] == 304
    tied, align = planned["stages"][1], planned["stages"][0]
    assert tied["optimizer"] < align["optimizer"]
    # The teacher is the dense model, which is what align trains.
    assert (align["teacher"], tied["teacher"]) == (0, align["parameters"])
    assert not (tmp_path / "run").exists()
    assert cli.run([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["last"]["step"] == 2
    assert cli.run([*args[:-1], "stages.1.stepz=1"]) == 2
    assert "did you mean steps?" in capsys.readouterr().err


def test_published_recipes_can_be_read() -> None:
    names = {"llama-2-7b", "llama-2-13b", "llama-3.1-8b-v5e-256", "smollm2-gpu", "smollm2-cpu", "smollm2-slim"}
    assert names == set(recipes.SHIPPED)
    for name, path in recipes.SHIPPED.items():
        assert yaml.safe_load(recipes.to_yaml(recipes.load(name)))["model"]
        assert recipes.load(name) == recipes.load(path)
