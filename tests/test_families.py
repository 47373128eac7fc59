"""All that the tool does, on models of every family: shared, dropped, post-trained, measured, run and exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cli_model
from postshare_run import TEXT, recipe
from support import FAMILY_VARIANTS, hf_logits, jax_logits, random_tokens, torch_or_skip

import headshare_jax as hs
from headshare_jax import cli
from headshare_jax.families import FAMILIES
from headshare_jax.train.loop import run

MODELS = {name.partition(",")[0]: name for name in FAMILY_VARIANTS if name.partition(",")[0] in FAMILIES}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `model`, and texts."""
    torch_or_skip()
    folder = tmp_path_factory.mktemp("family")
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    tiny_cli_model.saved(folder / "model", **FAMILY_VARIANTS[request.param] | small)
    for name in ("train.txt", "held-out.txt"):
        (folder / name).write_text(TEXT)
    return folder


def result(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """What the command answers to some words."""
    assert cli.run([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def shared(folder: Path, *words: object) -> tuple[object, ...]:
    fit = ("--calibrate", folder / "train.txt", "--calibrate-tokens", 256, "--seq-len", 32, "--overwrite")
    return ("share", folder / "model", folder / "shared", *words, *fit)


def test_a_model_is_shared_measured_run_and_exported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = result(capsys, *shared(folder, "--method", "plan", "--budget", 0.9))
    assert plan["ledger"]["attention_stored"] <= 0.9 * plan["ledger"]["attention_dense"]
    fitted = result(capsys, *shared(folder, "--method", "fitted", "--ratio", 0.3))
    assert fitted["receivers"] == int(0.3 * fitted["units"])
    assert fitted["ledger"]["actual_saving"] == fitted["ledger"]["nominal_saving"] > 0
    text = ("--text", folder / "held-out.txt", "--seq-len", 48, "--max-windows", 4)
    prompt = ("--prompt", "The quick", "--max-new-tokens", 20)
    perplexity = result(capsys, "eval", folder / "shared", *text)["token_perplexity"]
    answer = result(capsys, "generate", folder / "shared", *prompt)["results"]
    for to in ("hf", "hf-compact"):
        result(capsys, "convert", folder / "shared", folder / to, "--to", to)
        assert result(capsys, "eval", folder / to, *text)["token_perplexity"] == pytest.approx(perplexity, rel=1e-5)
        assert (
            result(capsys, "generate", folder / to, "--prompt", "The quick", "--max-new-tokens", 20)["results"]
            == answer
        )


def test_a_model_is_post_trained(folder: Path) -> None:
    import transformers

    run(recipe(folder), folder / "run")
    trained = hs.load(folder / "run" / "final")
    hs.save(trained, folder / "trained", to="hf")
    theirs, tokens = transformers.AutoModelForCausalLM.from_pretrained(folder / "trained"), random_tokens((2, 40))
    expected = hf_logits(theirs, tokens)
    assert np.abs(jax_logits(trained, tokens) - expected).max() < 2e-5 * np.abs(expected).max()
    assert trained.sharing is not None
