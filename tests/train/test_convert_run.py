"""A run's checkpoints, converted to models as its end would be."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from postshare_run import final_weights, recipe

import headshare_jax as hs
from headshare_jax import cli
from headshare_jax.convert import map_file
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import parameter_names
from headshare_jax.train import loop


def converted(run: Path, dst: Path, *more: str, to: str = "native") -> hs.Llama:
    assert cli.run(["convert", str(run), str(dst), "--to", to, *more]) == 0
    return hs.load(dst)


@pytest.mark.parametrize("to", ["native", "hf", "hf-compact"])
def test_the_newest_checkpoint_is_what_the_run_ended_with(finished: Path, tmp_path: Path, to: str) -> None:
    model = converted(finished, tmp_path / "out", to=to)
    expected = hs.load(finished / "final")
    dense = hs.unshare(expected) if to == "hf" else expected
    assert model.sharing == dense.sharing
    for name in parameter_names(dense.config):
        assert model.dtype(name) == expected.dtype(name)
        assert np.array_equal(model.array(name), dense.array(name)), name
    assert hs.load_tokenizer(tmp_path / "out").get_vocab() == hs.load_tokenizer(finished / "final").get_vocab()
    if to == "hf-compact":
        card = (tmp_path / "out" / "README.md").read_text()
        assert "chosen by the method `direct`" in card
        assert "Post-trained by PostShare in 9 steps" in card


def test_a_conversion_tells_the_step_and_counts_the_model_alone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(finished), str(tmp_path / "out"), "--to", "native", "--step", "8", "--json"]
    assert cli.run(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 8
    assert result["lines"][0].endswith("native of the run's checkpoint of step 8, every weight as it was")
    # Every value is four bytes long, beside a little about each array.
    values = 4 * hs.ledger(hs.load(finished / "final")).stored
    assert values < result["sizes"]["files"][0] < values + 20_000


def test_a_checkpoint_of_the_align_stage_is_shared(workplace: Path, tmp_path: Path) -> None:
    # Its frozen parameters lie beside it.
    stages = [{"kind": "align", "steps": 2, "learning_rate": 1e-3, "trainable": "attention"}]
    run = tmp_path / "run"
    loop.run(recipe(workplace, stages=stages, checkpoints={"every": 1, "eval_every": 9}), run)
    newest, first = converted(run, tmp_path / "two"), converted(run, tmp_path / "one", "--step", "1")
    assert newest.sharing == first.sharing == map_file.read(run / "map.json")
    same = {name: np.array_equal(newest.array(name), first.array(name)) for name in parameter_names(newest.config)}
    assert {name[0] for name, equal in same.items() if not equal} == set("qkvo")
    for name, value in final_weights(run).items():
        assert np.array_equal(value, newest.array(name)), name
    with pytest.raises(HeadshareError, match=r"no checkpoint of step 7, only of 1, 2\."):
        hs.convert.run_checkpoint.chosen(run, 7)


def test_a_run_is_inspected(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(finished), "--check", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["format"] == "checkpoint of a run"
    assert shown["map"] == json.loads((finished / "map.json").read_text())
    assert shown["provenance"]["postshare"] == {"step": 9}
    assert shown["checked"]["checksums"]
    for place in (finished, finished / "final"):
        assert cli.run(["inspect", str(place)]) == 0
        assert "\nPost-trained by PostShare in 9 steps, after the map was made\n" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    values = next((run / "checkpoints" / "9" / "arrays" / "params.embed_vd").rglob("0"))
    values = values if values.is_file() else next(path for path in values.rglob("*") if path.is_file())
    content = bytearray(values.read_bytes())
    content[5] ^= 1
    values.write_bytes(content)
    with pytest.raises(HeadshareError, match=r"chunk 0\.\d of params.embed_vd .* is not what was saved"):
        hs.load(run)


def test_the_recipe_names_the_format_of_the_end(workplace: Path, tmp_path: Path) -> None:
    stages = [{"kind": "tied", "steps": 1, "learning_rate": 1e-3}]
    loop.run(recipe(workplace, stages=stages, final={"to": "hf", "dtype": "bfloat16"}), tmp_path / "run")
    model = hs.load(tmp_path / "run" / "final")
    assert model.sharing is None
    assert model.dtype("embed_vd") == "bfloat16"
    assert (tmp_path / "run" / "final" / map_file.NAME).is_file()
