"""A run that begins with a slim model made for it: the one that the method makes, and what is cut stays cut."""

import json
from pathlib import Path

import numpy as np
import pytest
from postshare_run import TEXT, TIED, recipe

import headshare_jax as hs
from headshare_jax.convert import map_file
from headshare_jax.errors import HeadshareError
from headshare_jax.methods.table import find
from headshare_jax.methods.work import Amount, Made, Work
from headshare_jax.train import inputs, loop, run_folder
from headshare_jax.train import recipe as recipes


def slim(workplace: Path, **changes: object) -> recipes.Recipe:
    sharing = {"method": "slim", "budget": 0.7, "refit_windows": 6}
    return recipe(workplace, sharing=sharing, stages=[TIED | {"steps": 3}], **changes)


def expected(workplace: Path) -> Made:
    tokens = np.array(hs.load_tokenizer(workplace / "model")(TEXT).input_ids[: 6 * 32], np.int32)
    work = Work(hs.open_checkpoint(workplace / "model"), windows_wt=tokens.reshape(6, 32))
    return find("slim").make(work, Amount(budget=0.7))


def test_a_tied_stage_begins_with_the_slim_model(workplace: Path, tmp_path: Path) -> None:
    last = loop.run(slim(workplace), tmp_path / "run")
    made = expected(workplace)
    assert last is not None
    assert map_file.read(tmp_path / "run" / "map.json") == made.map
    assert len(json.loads((tmp_path / "run" / "refit.json").read_text())["blocks"]) == len(made.fit.blocks)  # type: ignore[union-attr]
    tokens = np.array(hs.load_tokenizer(workplace / "model")((workplace / "held-out.txt").read_text()).input_ids)
    start = hs.perplexity(hs.Llama.of(made.model), tokens, seq_len=32, max_windows=16)
    assert last["start_perplexity"] == pytest.approx(start.token_perplexity, rel=1e-4)
    final = hs.load(tmp_path / "run" / "final")
    assert final.sharing == made.map
    assert hs.ledger(final).attention_stored == hs.ledger(hs.Llama.of(made.model)).attention_stored


def test_a_run_that_was_stopped_before_its_first_step_makes_the_model_again(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.run(slim(workplace), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("headshare_jax.train.current.begin", _stopped)
        with pytest.raises(KeyboardInterrupt):
            loop.run(slim(workplace), tmp_path / "run")
    again = loop.run(slim(workplace), tmp_path / "run", resume=True)
    assert whole is not None
    assert again is not None
    assert again["lm_loss"] == pytest.approx(whole["lm_loss"], rel=1e-6)


def _stopped(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_a_map_that_is_not_made_again_is_refused(workplace: Path, tmp_path: Path) -> None:
    run = slim(workplace)
    task = inputs.prepare(run, tmp_path / "run", lambda *told: None)
    other = hs.SharingMap.from_json(json.dumps(json.loads(task.sharing.to_json()) | {"method": "other"}))
    run_folder.begin(tmp_path / "run", run, other)
    with pytest.raises(HeadshareError, match=r"another map than the run's map\.json; begin a new run"):
        loop.run(run, tmp_path / "run", resume=True)


def test_several_processes_are_told_what_to_do(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(HeadshareError, match="make it first, with `headshare share --method slim`"):
        inputs.open_inputs(slim(workplace))


def test_sizes_are_told_before_the_model_is_made(workplace: Path) -> None:
    source = hs.open_checkpoint(workplace / "model")
    sizes = hs.ledger(hs.Llama.of(hs.SharedView(source, inputs.pairs_to_plan(slim(workplace), source))))
    assert sizes.attention_stored / sizes.attention_dense == pytest.approx(0.7, abs=0.1)
