"""The command `headshare`: every command's result, and its JSON."""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tiny_cli_model import DIRECT

import headshare_jax as hs
from headshare_jax import cli


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"Example: headshare {command}" in printed
    assert not re.search(r"None|\b(STR|INT|FLOAT)\b|\|", printed)


def test_convert_there_and_back(headshare: Any, model: Path, tmp_path: Path) -> None:
    native = headshare("convert", model, tmp_path / "native", "--to", "native", "--json")
    assert native["format"] == "native"
    assert "every head" not in headshare("convert", tmp_path / "native", tmp_path / "hf", "--to", "hf")
    first, second = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path / "hf"))
    for name, value in first.state_dict().items():
        assert value.equal(second.state_dict()[name]), name
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_convert_can_store_another_type(headshare: Any, model: Path, tmp_path: Path) -> None:
    headshare("convert", model, tmp_path / "half", "--to", "native", "--dtype", "bfloat16")
    stored = hs.load(tmp_path / "half")
    exact = hs.load(model)
    assert stored.embed_vd.dtype == "bfloat16"
    assert np.array_equal(stored.embed_vd[...], exact.embed_vd[...].astype("bfloat16"))


def test_match_stores_the_three_arrays(headshare: Any, model: Path, tmp_path: Path) -> None:
    scores, picture = tmp_path / "scores.npz", tmp_path / "heatmap.png"
    result = headshare("match", model, "--match", "qkv", "-o", scores, "--plot", picture, "--json")
    expected = hs.match(hs.open_checkpoint(model), "qkv")
    with np.load(scores) as stored:
        assert set(stored) == {"donor_layer", "donor_unit", "value"}
        for name in stored:
            assert np.array_equal(stored[name], getattr(expected, name)), name
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result["best_pairs"][0]["score"] == expected.value.max()


def test_eval_reports_what_perplexity_gives(headshare: Any, model: Path, text: Path) -> None:
    args = ("eval", model, "--text", text, "--seq-len", 64, "--stride", 32, "--json")
    result = headshare(*args, "--mesh", 1, 1, 1)
    content = text.read_text()
    tokens = transformers.AutoTokenizer.from_pretrained(model)(content).input_ids
    expected = hs.perplexity(hs.load(model), tokens, seq_len=64, stride=32, words=len(content.split()))
    assert result["token_perplexity"] == expected.token_perplexity
    assert result["word_perplexity"] == expected.word_perplexity
    assert result["protocol"] == expected.protocol
    # By itself on all eight devices, or as is asked for.
    for mesh in ((), ("--mesh", 2, -1, 2)):
        assert headshare(*args, *mesh)["token_perplexity"] == pytest.approx(expected.token_perplexity, rel=1e-6)
    assert "perplexity" in headshare("eval", model, "--text", text, "--max-windows", 1, "--seq-len", 64)


def test_eval_tells_what_of_a_text_the_model_was_fitted_to(headshare: Any, model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fitted_to, other = ("".join(rng.choice(list("abcdefgh "), 1000)) for _ in range(2))
    (tmp_path / "text.txt").write_text(fitted_to)
    calibrate = ("--calibrate", tmp_path / "text.txt", "--calibrate-tokens", 640, "--seq-len", 64)
    headshare("share", model, tmp_path / "shared", "--ratio", 0.4, "--method", "refit", *calibrate)
    for content, seen, said in (
        # Cut elsewhere, too: 400 characters are ahead of it.
        (other[:400] + fitted_to, 10, "10 of 21 windows"),
        (other, 0, "None of the 15 windows was in the text that the model was fitted to."),
    ):
        (tmp_path / "judged.txt").write_text(content)
        args = ("eval", tmp_path / "shared", "--text", tmp_path / "judged.txt", "--seq-len", 64)
        assert headshare(*args, "--json")["overlap"]["seen"] == seen
        assert said in " ".join(headshare(*args).split())
    assert "overlap" not in headshare("eval", model, *args[2:], "--json")


def test_eval_tells_that_a_text_is_shorter_than_a_window(headshare: Any, model: Path, text: Path) -> None:
    text.write_text("A short text.")
    printed = " ".join(headshare("eval", model, "--text", text, "--seq-len", 64).split())
    assert "1 window of 13 tokens" in printed
    assert "shorter than --seq-len 64" in printed


def test_eval_reads_a_data_set(headshare: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["Some text. " * 20, "And more."]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = headshare("eval", model, "--text", "some/set:raw:validation", "--seq-len", 64, "--json")
    assert asked == [("some/set", "raw", "validation")]
    assert result["total_tokens"] == len("Some text. " * 20 + "\n\nAnd more.")


def test_generate(headshare: Any, model: Path) -> None:
    args = ("generate", model, "One", "Another one", "--max-new-tokens", 5)
    result = headshare(*args, "--json")
    assert headshare("generate", model, "--max-new-tokens", 5, "--prompt", "One", "Another one", "--json") == result
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text).input_ids for text in ("One", "Another one")]
    expected = hs.generate(hs.load(model), prompts, max_new_tokens=5)
    assert [entry["tokens"] for entry in result["results"]] == expected
    assert headshare(*args, "--mesh", 1, 4, 2, "--json") == result
    assert "Another one" in headshare(*args)
    chat = headshare(*args, "--chat", "--temperature", 0.7, "--top-k", 9, "--top-p", 0.9, "--json")
    assert len(chat["results"]) == 2


def test_a_mesh_that_does_not_fit_is_refused(refused: Any, model: Path, text: Path) -> None:
    for command in (("eval", model, "--text", text), ("generate", model, "One")):
        assert "needs a multiple of 3 devices, but there are 8" in refused(*command, "--mesh", 3, -1, 1)


def test_generate_holds_weights_in_the_type_that_decodes_fast(
    headshare: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headshare("convert", model, tmp_path / "bf16", "--to", "native", "--dtype", "bfloat16")
    held: list[np.dtype] = []

    def recorded(model: hs.Llama, *args: Any, **kwargs: Any) -> list[list[int]]:
        held.append(model.dtype("q_pool_pdh"))
        return hs.generate(model, *args, **kwargs)

    monkeypatch.setattr("headshare_jax.cli.generate.generate", recorded)
    args = ("generate", tmp_path / "bf16", "--prompt", "One", "--max-new-tokens", 5, "--json")
    assert headshare(*args)["results"] == headshare(*args, "--dtype", "bfloat16")["results"]
    assert held == ["float32", "bfloat16"]


def test_installed_command_keeps_what_it_compiles(model: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HEADSHARE_CACHE": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    command = [sys.executable, "-m", "headshare_jax", "generate", str(model), "--prompt", "One", "--json"]

    def run() -> tuple[Any, bytes, list[str]]:
        done = subprocess.run([*command, "--max-new-tokens", "2"], capture_output=True, check=True, env=environment)
        kept = sorted(path.name for path in (tmp_path / "compiled").glob("*/*-cache"))
        return json.loads(done.stdout), done.stderr, kept

    first = run()
    assert len(first[0]["results"]) == 1
    assert first[1].decode().split() == ["loading", str(model)]
    assert first[2]
    assert run() == first


def test_inspect(headshare: Any, model: Path, tmp_path: Path) -> None:
    headshare("share", model, tmp_path / "shared", *DIRECT, "--ratio", 0.5)
    result = headshare("inspect", tmp_path / "shared", "--json")
    checkpoint = hs.open_checkpoint(tmp_path / "shared")
    assert hs.LlamaConfig.from_json(result["config"]) == checkpoint.config
    assert hs.SharingMap.from_json(json.dumps(result["map"])) == checkpoint.sharing
    files = [file for file in (tmp_path / "shared").rglob("*") if file.is_file()]
    assert result["ledger"]["disk_bytes"] == sum(file.stat().st_size for file in files)
    assert (result["format"], result["family"]) == ("native", "llama")
    printed = headshare("inspect", tmp_path / "shared")
    assert checkpoint.sharing.summary() in printed
    assert "FLOPs" in printed
    assert "0.1 " not in printed
    assert "k_pool_pdh" not in printed
    (receiver,) = checkpoint.sharing.receivers[:1]
    layer, unit = divmod(int(receiver), 2)
    assert f"{layer}.{unit} " in headshare("inspect", tmp_path / "shared", "--pairs")
    assert "k_pool_pdh" in headshare("inspect", tmp_path / "shared", "--shapes")
    assert "Dense" in headshare("inspect", model)


def test_inspect_draws_the_map_and_reads_all_of_it(headshare: Any, refused: Any, model: Path, tmp_path: Path) -> None:
    shared, picture = tmp_path / "shared", tmp_path / "map.png"
    headshare("share", model, shared, "--ratio", 0.5, "--method", "direct")
    result = headshare("inspect", shared, "--plot", picture, "--check", "--json")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result["checksums"] is result["checked"]["checksums"] is True
    assert "as they were written" in headshare("inspect", shared, "--check")
    assert "no map to draw (--plot)" in refused("inspect", model, "--plot", tmp_path / "none.png")
    assert "exists already" in refused("inspect", shared, "--plot", picture)
    chunk = max((shared / "weights").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    damaged = bytearray(chunk.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    chunk.write_bytes(damaged)
    assert "damaged" in refused("inspect", shared, "--check", "--plot", tmp_path / "none.png")


def test_inspect_tells_how_a_gguf_file_stores_its_values(headshare: Any, model: Path, tmp_path: Path) -> None:
    headshare("convert", model, tmp_path / "small.gguf", "--to", "gguf", "--quantize", "q8_0")
    result = headshare("inspect", tmp_path / "small.gguf", "--json")
    sizes = {name: np.prod(each["shape"]) for name, each in result["parameters"].items()}
    norms = sum(int(size) for name, size in sizes.items() if "norm" in name)
    assert result["stored_types"] == {"q8_0": int(sum(sizes.values())) - norms, "float32": norms}
    assert result["format"] == "gguf (llama)"
    assert result["provenance"]["source"] == model.name
    assert not result["checksums"]
    printed = headshare("inspect", tmp_path / "small.gguf")
    assert "stored as q8_0" in printed
    assert "read as float32" in printed


def test_demo_tells_the_whole_story(headshare: Any, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "story"
    args = ("demo", model, "-o", folder, "--ratio", 0.5, "--calibrate-tokens", 2048)
    result = headshare(*args, "--json")
    assert result["methods"]["fitted"]["ratio"] < result["methods"]["direct"]["ratio"]
    assert set(result["answers"]) == {"dense", "fitted"}
    sharing = hs.load(folder / "native").sharing
    assert sharing is not None
    assert (sharing.method, len(sharing.receivers)) == ("fitted", 3)
    assert (folder / "map.png").read_bytes().startswith(b"\x89PNG")
    transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    printed = headshare(*args, "--overwrite")
    assert printed.index("dense") < printed.index("direct") < printed.index("headshare chat")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"headshare-jax {importlib.metadata.version('headshare-jax')}\n"
