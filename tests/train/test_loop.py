"""PostShare runs: resumed equals uninterrupted, on any mesh; stages; what is written; what is refused."""

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
import orbax.checkpoint as ocp
import pytest
import tiny_cli_model
import yaml

import headshare_jax as hs
from headshare_jax import cli
from headshare_jax.convert import map_file, tokenizer
from headshare_jax.errors import HeadshareError
from headshare_jax.fit.refit import refit
from headshare_jax.parameters import parameter_names
from headshare_jax.plan.footprint import footprint
from headshare_jax.sharing.view import cast
from headshare_jax.train import loop
from headshare_jax.train import recipe as recipes

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps.\n" * 150
ALIGN = {"kind": "align", "steps": 5, "learning_rate": 1e-3}
TIED = {"kind": "tied", "steps": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text to train on, one to evaluate on, and a cache."""
    folder = tmp_path_factory.mktemp("postshare")
    tiny_cli_model.saved(folder / "model")
    (folder / "train.txt").write_text(TEXT)
    (folder / "held-out.txt").write_text("The lazy dog sleeps, and the fox jumps.\n" * 10)
    os.environ["HEADSHARE_CACHE"] = str(folder / "cache")
    return folder


def recipe(workplace: Path, **changes: Any) -> recipes.Recipe:
    """A short run: align, then tied, in float32 on all eight devices."""
    document: dict[str, Any] = {
        "model": str(workplace / "model"),
        "data": {"train": str(workplace / "train.txt"), "eval": str(workplace / "held-out.txt"), "seq_len": 32},
        "sharing": {"ratio": 0.5},
        "stages": [ALIGN, TIED],
        "batch_size": 8,
        "compute_dtype": "float32",
        "remat": "none",
        "checkpoints": {"every": 2, "keep": 2, "eval_every": 3},
    }
    return recipes.from_mapping(document | changes)


def metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and penalty of every line."""
    return [(line["step"], line["loss"], line["sim_loss"]) for line in metrics(run)]


def final_weights(run: Path) -> dict[str, np.ndarray]:
    """Parameters of the model that a run ended with."""
    model = hs.load(run / "final")
    return {name: np.asarray(getattr(model, name)[...]) for name in parameter_names(model.config)}


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


REFIT = {"sharing": {"ratio": 0.5, "refit_windows": 6}}


def refitted(dense: hs.Llama, run: Path) -> hs.Llama:
    """A dense model shared by a run's map, its output weights fitted on the first six windows of the run's text."""
    windows = np.array(tokenizer.load(run / "final")(TEXT).input_ids[: 6 * 32], np.int32).reshape(6, 32)
    shared = hs.share(dense, map_file.read(run / "map.json"), check_source=False)
    return refit(dense, shared, windows)[0]


# The checkpoint is read back as it lies, without the run's mesh, which is what Orbax warns of.
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_that_ends_with_align_exports_the_refitted_model(workplace: Path, tmp_path: Path) -> None:
    run, short = tmp_path / "run", recipe(workplace, stages=[ALIGN | {"steps": 2}], **REFIT)
    last = loop.run(short, run)
    aligned = ocp.PyTreeCheckpointer().restore(run / "checkpoints" / "2" / "arrays")["state"]["params"]
    final, dense = hs.load(run / "final"), hs.load(workplace / "model")
    assert not np.array_equal(aligned["o_pool_phd"], dense.o_pool_phd[...])
    expected = refitted(hs.Llama(dense.config, aligned), run)
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


def told(short: recipes.Recipe, run: Path, *, until: str | int | None = None, resume: bool = False) -> list[str | int]:
    """The kinds of work and the steps that a run tells of, in order; it is interrupted at one of them, or never."""
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
    return list(dict.fromkeys(seen))


def test_a_tied_stage_begins_with_the_refitted_model(workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = recipe(workplace, stages=[TIED | {"steps": 1, "trainable": "final_norm_d"}], **REFIT)
    assert told(short, run, until=1)[-2:] == ["refitting", 1]
    assert told(short, run, resume=True) == ["refitting", 1]
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


@pytest.fixture(scope="module")
def finished(workplace: Path) -> Path:
    """A run of both stages, never interrupted."""
    loop.run(recipe(workplace), workplace / "whole")
    return workplace / "whole"


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
    assert named == {name for line in metrics(finished) for name in line}


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


_HINDERED = """
import os, resource, signal, sys
sys.path.insert(0, {tests!r})
import conftest, jax
from pathlib import Path
from headshare_jax.train import loop, recipe

{begin}

def report(line):
    if line["step"] == {step}:
        {action}

result = loop.run(recipe.load(Path({recipe!r})), Path({run!r}), resume={resume}, report=report)
print("stopped" if result is None else "finished")
"""


def run_killed(workplace: Path, run: Path, step: int, how: str, *, begin: str = "") -> subprocess.CompletedProcess[str]:
    """A run in a process of its own that gets a signal after a step."""
    return run_hindered(workplace, run, step, f"os.kill(os.getpid(), signal.{how})", begin=begin)


def run_hindered(
    workplace: Path, run: Path, step: int, action: str, *, begin: str = "", resume: bool = False
) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own that does something to itself after a step."""
    path = run.with_suffix(".yaml")
    path.write_text(recipes.to_yaml(recipe(workplace)))
    tests = str(Path(__file__).parents[1])
    code = _HINDERED.format(
        tests=tests, begin=begin, step=step, action=action, recipe=str(path), run=str(run), resume=resume
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("step", [1, 7])
def test_killed_and_resumed_is_as_if_never_interrupted(finished: Path, workplace: Path, step: int) -> None:
    run = workplace / f"killed-{step}"
    assert run_killed(workplace, run, step, "SIGKILL").returncode == -signal.SIGKILL
    loop.run(recipe(workplace), run, resume=True)
    assert losses(run) == losses(finished)
    for name, value in final_weights(finished).items():
        assert np.array_equal(value, final_weights(run)[name]), name


def test_sigterm_saves_and_ends_well(finished: Path, workplace: Path) -> None:
    run = workplace / "terminated"
    done = run_killed(workplace, run, 3, "SIGTERM")
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
    assert (run / "checkpoints" / "3").is_dir()
    assert not (run / "final").exists()
    loop.run(recipe(workplace), run, resume=True)
    assert losses(run) == losses(finished)


def test_ctrl_c_saves_and_a_second_one_does_not(finished: Path, workplace: Path) -> None:
    # Where tests run in the background, a process begins with SIGINT ignored.
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    run, twice = workplace / "interrupted", workplace / "interrupted-twice"
    done = run_killed(workplace, run, 3, "SIGINT", begin=heard)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "Stopping after this step, with a checkpoint" in done.stderr
    assert (run / "checkpoints" / "3").is_dir()
    loop.run(recipe(workplace), run, resume=True)
    assert losses(run) == losses(finished)
    again = "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)"
    assert run_hindered(workplace, twice, 3, again, begin=heard).returncode == -signal.SIGINT
    assert not (twice / "checkpoints" / "3").exists()


def test_resumed_on_another_mesh(finished: Path, workplace: Path) -> None:
    run = workplace / "other-mesh"
    assert run_killed(workplace, run, 4, "SIGTERM").stdout == "stopped\n"
    loop.run(recipe(workplace, mesh={"data": 1, "fsdp": 4, "tensor": 2}), run, resume=True)
    for mine, theirs in zip(losses(run), losses(finished), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    for name, value in final_weights(finished).items():
        np.testing.assert_allclose(final_weights(run)[name], value, rtol=1e-4, atol=1e-5)


def test_damaged_checkpoint_falls_back_to_the_one_before(finished: Path, workplace: Path) -> None:
    run = workplace / "damaged"
    assert run_killed(workplace, run, 7, "SIGTERM").stdout == "stopped\n"
    (largest,) = sorted((run / "checkpoints" / "7").rglob("*"), key=lambda path: path.stat().st_size)[-1:]
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    # In a process of its own: reads that were under way when the first one failed may outlive the test.
    done = run_hindered(workplace, run, 0, "pass", resume=True)
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    assert "step 7 cannot be used" in done.stderr
    assert losses(run) == losses(finished)


def test_steps_of_an_unusable_checkpoint_are_done_and_saved_again(
    finished: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = workplace / "foreign"
    assert run_killed(workplace, run, 8, "SIGTERM").stdout == "stopped\n"
    document = run / "checkpoints" / "8" / "document" / "metadata"
    document.write_text(json.dumps({"format": "another"}))
    loop.run(recipe(workplace), run, resume=True)
    assert "step 8 cannot be used" in caplog.text
    assert "not a checkpoint of a PostShare run" in caplog.text
    assert losses(run) == losses(finished)
    assert {"8", "9"} <= {path.name for path in (run / "checkpoints").iterdir()}
    caplog.clear()
    loop.run(recipe(workplace), run, resume=True)
    assert "cannot be used" not in caplog.text


def test_a_full_disk_leaves_earlier_checkpoints_to_resume_from(finished: Path, workplace: Path) -> None:
    # Here there is none yet, so that the run begins anew.
    run = workplace / "full"
    # Files end there as on a full disk; metrics are smaller, a checkpoint's arrays larger.
    done = run_hindered(workplace, run, 3, "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))")
    assert done.returncode == 1
    # Threads that were writing have their say before and after.
    (error,) = re.findall(r"^headshare_jax.errors.HeadshareError: (.*)$", done.stderr, re.MULTILINE)
    assert error.startswith(f"A checkpoint in {run / 'checkpoints'} could not be written")
    assert error.endswith("earlier ones are intact.")
    loop.run(recipe(workplace), run, resume=True)
    assert losses(run) == losses(finished)


def test_resuming_with_a_changed_recipe_is_refused(finished: Path, workplace: Path) -> None:
    changed = recipe(workplace, stages=[ALIGN | {"learning_rate": 1e-2}, TIED])
    with pytest.raises(HeadshareError, match=r"stages.0.learning_rate: 0.001 -> 0.01"):
        loop.run(changed, finished, resume=True)


def test_checkpoint_of_other_data_is_refused(finished: Path, workplace: Path) -> None:
    run = workplace / "other-data"
    shutil.copytree(finished, run)
    text = workplace / "train.txt"
    text.write_text(TEXT + "And one more line.\n")
    try:
        with pytest.raises(HeadshareError, match="other data"):
            loop.run(recipe(workplace), run, resume=True)
    finally:
        text.write_text(TEXT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": {"fsdp": 16}}, "16 devices"),
        ({"mesh": {"fsdp": 3}}, "3 devices"),
        ({"batch_size": 12}, "multiple"),
        ({"data": {"train": "absent.txt", "seq_len": 32}}, "no file absent.txt"),
        ({"sharing": {"ratio": 0.0}}, "no receivers"),
        ({"sharing": {"map": "absent.json"}}, "absent.json"),
        ({"sharing": {"refit_windows": 305}}, r"refit_windows \(305\) is more than the 304 blocks of seq_len 32"),
        ({"stages": [ALIGN | {"trainable": "nothing"}]}, "nothing"),
    ],
)
def test_impossible_runs_are_refused(workplace: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    refused(recipe(workplace, **changes), said, tmp_path)


def test_text_shorter_than_a_block_is_refused_before_matching(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(loop, "match")
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
    with pytest.raises(HeadshareError, match="--resume"):
        loop.run(recipe(workplace), finished)
    with pytest.raises(HeadshareError, match="no run to resume"):
        loop.run(recipe(workplace), workplace / "never", resume=True)
    with pytest.raises(HeadshareError, match="exists already; choose another"):
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
    assert {"llama-2-7b", "llama-2-13b", "llama-3.1-8b-v5e-256", "smollm2-gpu", "smollm2-cpu"} == set(recipes.SHIPPED)
    for name, path in recipes.SHIPPED.items():
        assert yaml.safe_load(recipes.to_yaml(recipes.load(name)))["model"]
        assert recipes.load(name) == recipes.load(path)
