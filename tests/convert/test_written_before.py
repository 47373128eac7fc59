"""Files that release 0.1.0 wrote are read as they were meant: models, maps, scores, journals and a sweep."""

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import hf_logits, jax_logits

import headshare_jax as hs
from headshare_jax import cli, parameters
from headshare_jax.convert import map_file, scores_file
from headshare_jax.convert.journal_folder import JournalFolder
from headshare_jax.sharing.source import assemble, whole_fingerprint

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0.1"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(WRITTEN / "expected.npz") as stored:
        return dict(stored)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to go on in, as the working folder of the release that wrote it."""
    folder = Path(shutil.copytree(WRITTEN, tmp_path / "written"))
    monkeypatch.chdir(folder)
    # Work is gone on with by the release that began it.
    monkeypatch.setattr("headshare_jax.convert.journal_folder.importlib.metadata.version", lambda name: "0.1.0")
    return folder


def sums(source: hs.WeightSource) -> dict[str, str]:
    names = parameters.parameter_names(source.config)
    return {name: hashlib.sha256(assemble(source, name).tobytes()).hexdigest() for name in names}


@pytest.mark.parametrize(
    ("folder", "weights"),
    [("dense", "dense"), ("dense-hf", "dense"), ("shared", "shared"), ("shared-compact", "shared")],
)
def test_models_have_the_weights_that_were_written(arrays: dict[str, np.ndarray], folder: str, weights: str) -> None:
    source, expected = hs.open_checkpoint(WRITTEN / folder), EXPECTED[weights]
    assert sums(source) == expected["sha256"]
    assert hs.fingerprint(source) == expected["fingerprint"]
    assert whole_fingerprint(source) == expected["whole_fingerprint"]
    assert hs.ledger(source).stored == expected["parameters"]["stored"]
    logits = arrays[f"{weights}_logits"]
    assert np.abs(jax_logits(hs.load(source), arrays["tokens"]) - logits).max() < 1e-5 * np.abs(logits).max()


def test_an_expanded_model_and_the_map_beside_it_are_the_shared_one(arrays: dict[str, np.ndarray]) -> None:
    sharing = map_file.read(WRITTEN / "shared-hf" / map_file.NAME)
    assert sharing == hs.open_checkpoint(WRITTEN / "shared").sharing
    view = hs.SharedView(hs.open_checkpoint(WRITTEN / "shared-hf"), sharing)
    assert sums(view) == EXPECTED["shared"]["sha256"]


def test_an_expanded_model_is_written_as_it_was(tmp_path: Path) -> None:
    before = WRITTEN / "shared-hf"
    hs.save(hs.open_checkpoint(WRITTEN / "shared"), tmp_path / "out", to="hf")
    for path in before.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_pytorch_runs_the_code_of_that_release(arrays: dict[str, np.ndarray]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        WRITTEN / "shared-compact", trust_remote_code=True, dtype=torch.float32
    )
    logits = arrays["shared_logits"]
    assert np.abs(hf_logits(model.eval(), arrays["tokens"]) - logits).max() < 1e-5 * np.abs(logits).max()


def test_tokenizers_and_texts_give_the_same_perplexity_and_tokens() -> None:
    tokenizer, model = hs.load_tokenizer(WRITTEN / "shared"), hs.load(WRITTEN / "shared")
    text = (WRITTEN / EXPECTED["perplexity"]["text"]).read_text()
    measured = hs.perplexity(model, tokenizer(text, verbose=False).input_ids, seq_len=EXPECTED["perplexity"]["seq_len"])
    expected = EXPECTED["perplexity"]["shared"]
    assert measured.token_perplexity == pytest.approx(expected["token_perplexity"], rel=1e-5)
    assert measured.scored_tokens == expected["scored_tokens"]
    said = EXPECTED["generated"]
    assert hs.generate(model, [said["prompt"]], max_new_tokens=12, stop_tokens=())[0] == said["shared"]


@pytest.mark.parametrize("name", sorted(EXPECTED["maps"]))
def test_maps_are_read_and_written_as_they_were(name: str) -> None:
    sharing, expected = map_file.read(WRITTEN / "maps" / name), EXPECTED["maps"][name]
    assert sharing.unit_tie is not None
    assert sharing.donor.tolist() == expected["donor"]
    assert sharing.unit_tie.tolist() == expected["tie"]
    assert sharing.summary() == expected["summary"]
    assert sharing.to_json() == (WRITTEN / "maps" / name).read_text()


def test_scores_are_read_and_written_as_they_were(tmp_path: Path) -> None:
    path = WRITTEN / "scores" / "functional.npz"
    result = scores_file.read(path)
    assert (result.match, result.heads_per_unit) == ("functional", 2)
    assert result.source == EXPECTED["dense"]["fingerprint"]
    scores_file.write(result, tmp_path / "again.npz")
    with np.load(path) as before, np.load(tmp_path / "again.npz") as after:
        assert set(after) == set(before)
        for name in before:
            assert np.array_equal(before[name], after[name]), name


def test_a_map_that_was_made_by_plan_follows_from_the_scores() -> None:
    scores = scores_file.read(WRITTEN / "scores" / "functional.npz")
    config = hs.open_checkpoint(WRITTEN / "dense").config
    assert hs.budget_map(scores, config, 0.7).donor.tolist() == EXPECTED["maps"]["budget.json"]["donor"]


def test_work_goes_on_from_its_journals(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copy / "journal").rglob("*")}
    done = hs.compress(
        "dense", method="fitted", ratio=0.34, calibrate="texts/calibration.txt", calibrate_tokens=128, seq_len=16,
        work="journal", progress=False,
    )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in (copy / "journal").rglob("*")} == before
    assert done.map.donor.tolist() == EXPECTED["maps"]["fitted.json"]["donor"]
    assert done.record is not None
    (fitted,) = done.record["blocks"]
    assert fitted == json.loads((copy / "refitted" / "headshare_fit.json").read_text())["blocks"][0]
    assert JournalFolder(copy / "journal").path == copy / "journal"


def test_a_sweep_goes_on_with_nothing_to_do(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept: dict[Path, Any] = {
        path: path.read_bytes() for path in (copy / "sweep" / "cache").rglob("*") if path.is_file()
    }
    with (copy / "sweep" / "points.csv").open() as file:
        points = list(csv.DictReader(file))
    words = ["sweep", "dense", "-o", "sweep", "--budgets", "0.8", "--methods", "direct,plan"]
    words += ["--calibrate", "texts/calibration.txt", "--calibrate-tokens", "128", "--seq-len", "16", "--resume"]
    assert cli.run([*words, "--text", "texts/held-out.txt", "--max-windows", "4"]) == 0, capsys.readouterr().err
    assert {path: path.read_bytes() for path in (copy / "sweep" / "cache").rglob("*") if path.is_file()} == kept
    with (copy / "sweep" / "points.csv").open() as file:
        # There are new columns; no figure changes.
        again = [{name: row[name] for name in points[0]} for row in csv.DictReader(file)]
    assert again == points
