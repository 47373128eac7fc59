"""`headshare plan`: its results, its JSON, and what it says of bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import support

import headshare_jax as hs
from headshare_jax import cli

PER_MODEL = {"argument_bytes", "temporary_bytes", "hbm_bytes_accessed", "flops", "fits", "compile_seconds"}


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; returns its exit code, and what it printed, as data if it was asked for JSON."""

    def call(*args: object) -> tuple[int, Any]:
        capsys.readouterr()
        code = cli.run(["plan", *map(str, args)])
        printed = capsys.readouterr()
        if code:
            assert printed.out == ""
            return code, printed.err
        return code, json.loads(printed.out) if "--json" in args else printed.out

    return call


def test_a_config_alone_is_planned_and_compiled(plan: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(support.hf_config().to_dict()))
    args = ("--topology", "v5e:2x2", "--devices", 1, "--stage", "decode", "--ratio", 0.5, "--length", 128, "--json")
    code, result = plan(path, *args)
    assert code == 0
    assert PER_MODEL <= set(result["dense"]) == set(result["shared"])
    assert (result["devices"], result["receivers"], result["units"]) == (1, 3, 6)
    assert result["shared"]["argument_bytes"] < result["dense"]["argument_bytes"]
    _, of_the_folder = plan(tmp_path, *args, "--host")
    assert of_the_folder["dense"]["parameter_bytes"] == result["dense"]["parameter_bytes"]


def test_a_shared_model_is_planned_by_its_own_map(plan: Any, tmp_path: Path) -> None:
    model = support.tiny_model()
    sharing = support.sharing_by_hand(model, "qk", {2: 0, 3: 1})
    hs.save(hs.share(model, sharing), tmp_path / "shared")
    args = (tmp_path / "shared", "--topology", "v6e:1x1", "--stage", "prefill", "--length", 64, "--host", "--json")
    _, result = plan(*args)
    assert (result["receivers"], result["tie"]) == (2, "qk")
    code, said = plan(*args[:-1], "--tie", "qkvo")
    assert code == 2
    assert "own map" in said
    _, result = plan(*args, "--ratio", 0.5, "--tie", "qkvo")
    assert (result["receivers"], result["tie"]) == (3, "qkvo")


def test_a_budget_plans_slim_units(plan: Any) -> None:
    args = ("llama-2-7b", "--topology", "v5e:2x2", "--devices", 1, "--stage", "decode", "--length", 1024, "--host")
    _, result = plan(*args, "--budget", 0.75, "--json")
    dense, slim = result["dense"], result["shared"]
    attention = 2 * 32 * 4 * 4096**2
    assert dense["parameter_bytes"] - slim["parameter_bytes"] == pytest.approx(attention / 4, rel=1e-3)
    assert slim["cache_bytes"] == pytest.approx(0.75 * dense["cache_bytes"], rel=1e-3)
    _, text = plan(*args, "--budget", 0.75)
    assert "smaller" in text


def test_a_person_reads_what_bounds_the_step(plan: Any) -> None:
    code, text = plan("llama-2-7b", "--topology", "v5e:16x16", "--host")
    assert code == 0
    for said in ("estimated, not compiled", "fsdp 256", "optimizer", "activations kept", "room left", "bound by"):
        assert said in " ".join(text.split())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("llama-2-7b", "--topology", "v5q:2x2"), "no TPU topology; give one such as v5e:1x1"),
        (("llama-9", "--topology", "v5e:2x2"), "llama-9 is neither a model nor one of llama-2-7b"),
        (("llama-2-7b", "--topology", "v5e:2x2", "--ratio", 1.5, "--host"), "ratio must be at least 0 and below 1"),
        (("llama-2-7b", "--topology", "v5e:2x2", "--budget", 0.7, "--tie", "qk", "--host"), "Slim units share nothing"),
        (("llama-2-7b", "--topology", "v5e:2x2", "--batch", 0, "--host"), "--batch must be at least 1"),
        (("llama-2-7b", "--topology", "v5e:2x2", "--mesh", 3, 1, 1, "--host"), "needs 3 devices, but there are 4"),
        (
            ("llama-2-7b", "--topology", "v5e:2x2", "--stage", "train", "--host"),
            "--stage does not take 'train'; it takes decode",
        ),
        (("llama-2-7b", "--topology", "v5e:2x2", "--devices", 5, "--host"), "not 5 (--devices)"),
        (
            ("llama-2-7b", "--topology", "v5e:2x2", "--stage", "decode", "--remat", "full", "--host"),
            "no use for remat; leave it out (--remat)",
        ),
    ],
)
def test_bad_input_is_refused(plan: Any, args: tuple[object, ...], said: str) -> None:
    code, text = plan(*args)
    assert code == 2
    assert said in text
    assert text.splitlines()[-1].startswith("headshare: ")


def test_a_damaged_config_is_refused(plan: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1]")
    assert plan(path, "--topology", "v5e:1x1") == (
        2,
        f"headshare: {path} does not hold a JSON object; fetch it again.\n",
    )
    path.write_text("{")
    code, text = plan(path, "--topology", "v5e:1x1")
    assert code == 2
    assert "not readable JSON" in text
