"""`headshare share`: what it makes, and that it does what the library does."""

import importlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import transformers
from tiny_cli_model import DIRECT

import headshare_jax as hs


def test_share_by_ratio_and_by_its_own_map(headshare: Any, model: Path, tmp_path: Path) -> None:
    result = headshare(
        "share", model, tmp_path / "one", *DIRECT, "--ratio", 0.5, "--save-map", tmp_path / "map.json",
        "--plot", tmp_path / "map.svg", "--json",
    )  # fmt: skip
    headshare("share", model, tmp_path / "two", *DIRECT, "--map", tmp_path / "map.json")
    one, two = hs.load(tmp_path / "one"), hs.load(tmp_path / "two")
    assert result["receivers"] == 3
    assert one.sharing == two.sharing == hs.SharingMap.from_json((tmp_path / "map.json").read_text())
    assert "<svg" in (tmp_path / "map.svg").read_text()
    sizes = result["ledger"]
    assert sizes["actual_saving"] == sizes["nominal_saving"] > 0
    tokens = support.random_tokens((2, 16))
    assert np.array_equal(support.jax_logits(one, tokens), support.jax_logits(two, tokens))


def test_share_by_a_map_edited_to_drop_a_unit(headshare: Any, model: Path, tmp_path: Path) -> None:
    headshare("share", model, tmp_path / "plain", *DIRECT, "--ratio", 0.5, "--save-map", tmp_path / "map.json")
    document = json.loads((tmp_path / "map.json").read_text())
    dropped = {name: value for name, value in document["receivers"].pop().items() if name != "donor"}
    document["receivers"][0]["tie"] = "qk"
    (tmp_path / "map.json").write_text(json.dumps(document | {"dropped": [dropped]}))
    args = (*DIRECT, "--map", tmp_path / "map.json", "--plot", tmp_path / "map.svg", "--overwrite")
    result = headshare("share", model, tmp_path / "out", *args, "--json")
    assert (result["receivers"], result["dropped"]) == (2, 1)
    assert result["ledger"]["actual_saving"] == result["ledger"]["nominal_saving"] > 0
    assert hs.load(tmp_path / "out").sharing == hs.SharingMap.from_json((tmp_path / "map.json").read_text())
    summary = "2 of 6 units use another unit's qk or qkv weights, 1 is dropped"
    assert summary in " ".join(headshare("share", model, tmp_path / "out", *args).split())
    picture = (tmp_path / "map.svg").read_text()
    assert summary in " ".join(re.findall("<text[^>]*>([^<]*)", picture))
    assert ">dropped</text>" in picture
    assert f"Map: {summary}" in headshare("inspect", tmp_path / "out")


def test_share_and_refit_keeps_the_record_beside_the_model(
    headshare: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    args = (
        "--ratio",
        0.5,
        "--no-eval",
        "--method",
        "refit",
        "--calibrate",
        text,
        "--calibrate-tokens",
        640,
        "--seq-len",
        64,
    )
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
    tokens = np.array([list(text.read_bytes()[:64])])
    expected = support.jax_logits(hs.load(model), tokens)
    errors = [np.linalg.norm(support.jax_logits(each, tokens) - expected) for each in (direct, refitted)]
    assert errors[1] < errors[0]
    printed = headshare("share", model, tmp_path / "printed", *args)
    assert re.findall(r"^(size|quality|took|next)\b", printed, re.MULTILINE) == ["size", "quality", "took", "next"]


def test_donors_within_shards_need_no_weights_of_other_chips(headshare: Any, model: Path, tmp_path: Path) -> None:
    args = ("--ratio", 0.5, *DIRECT, "--match", "random", "--seed", 1)
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
    result = headshare("share", model, tmp_path / "fitted", "--ratio", 0.4, *calibrate, "--json")
    dense = hs.load(model)
    windows = hs.calibration_windows(
        list(transformers.AutoTokenizer.from_pretrained(model)(text.read_text()).input_ids), 10, 64, 259
    )
    expected = hs.sharing_map(hs.match_functional(dense, windows), 0.4, chains="forbid")
    sharing = hs.load(tmp_path / "fitted").sharing
    assert sharing is not None
    assert np.array_equal(sharing.donor, expected.donor)
    assert (sharing.method, sharing.match, sharing.chains) == ("fitted", "functional", "forbid")
    assert {fit["block"] for fit in result["fit"]["blocks"]} == {"attention"}
    quality = result["quality"]
    assert (quality["windows"], quality["seq_len"]) == (16, 64)
    assert quality["ratio"] == pytest.approx(quality["after"] / quality["before"])
    assert result["sizes"]["files"][1] == result["ledger"]["disk_bytes"]


def test_what_share_keeps_serves_another_ratio(
    headshare: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--no-eval", "--calibrate", text, "--calibrate-tokens", 640, "--seq-len", 64, "--ratio")
    headshare("share", model, tmp_path / "first", *args, 0.2, "--work", tmp_path / "work")

    def again(*args: Any) -> Any:
        raise AssertionError("This was computed before.")

    with monkeypatch.context() as patch:
        patch.setattr("headshare_jax.matching.functional.attention_gradients", again)
        headshare("share", model, tmp_path / "second", *args, 0.4, "--work", tmp_path / "work")
        patch.setattr(importlib.import_module("headshare_jax.fit.refit"), "_fit_block", again)
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
        headshare("share", model, tmp_path / name, *DIRECT, "--ratio", 0.5, "--match", "random", "--seed", seed)
    a, b, c = (hs.open_checkpoint(tmp_path / name).sharing for name in "abc")
    assert a == b != c


def test_shared_model_exported_plain_has_its_map_beside_it(headshare: Any, model: Path, tmp_path: Path) -> None:
    headshare("share", model, tmp_path / "hf", *DIRECT, "--ratio", 0.5, "--tie", "qkvo", "--to", "hf")
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


def test_several_texts_are_fitted_to_and_told_of(headshare: Any, model: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "2@other.txt"
    other.write_text("A slow green turtle creeps under the busy cat. " * 40)
    args = ("--method", "refit", "--ratio", 0.4, "--calibrate-tokens", 384, "--seq-len", 64)
    mixed = ("--calibrate", f"2@{text}", "--calibrate", f"1@{other}")
    for to in ("native", "hf"):
        result = headshare("share", model, tmp_path / to, *args, *mixed, "--to", to, "--json")
    assert result["fit"]["calibrate"] == "text.txt and 2@other.txt"
    told = hs.open_checkpoint(tmp_path / "native").provenance["calibration"]  # type: ignore[union-attr]
    assert [(each["name"], each["weight"], each["windows"]) for each in told["texts"]] == [
        (str(text), 2.0, 4), (str(other), 1.0, 2),
    ]  # fmt: skip
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "6 windows of 64 tokens (sha256:" in card
    assert "): 4 from the start of `text.txt` (text " in card
    assert str(tmp_path) not in card
    tokens = [hs.load_tokenizer(model)(each.read_text()).input_ids for each in (text, other)]
    same = hs.compress(
        model, ratio=0.4, method="refit", calibrate=[(np.asarray(tokens[0]), 2), (np.asarray(tokens[1]), 1)],
        calibrate_tokens=384, seq_len=64, evaluate=False, progress=False,
    )  # fmt: skip
    for layer in range(3):
        written = hs.open_checkpoint(tmp_path / "native").read("o_pool_phd", layer)
        assert np.array_equal(written, same.model.read("o_pool_phd", layer))
    # Measured on one of them, which is named.
    result = headshare("share", model, tmp_path / "seen", *args, *mixed, "--text", other, "--json")
    assert f"were in the text that it was fitted to ({other})" in result["lines"][2]


def test_units_become_slim(headshare: Any, model: Path, text: Path, tmp_path: Path) -> None:
    args = ("--method", "slim", "--budget", 0.75, "--calibrate", text, "--calibrate-tokens", 640, "--seq-len", 64)
    result = headshare("share", model, tmp_path / "slim", *args, "--json")
    sharing = hs.load(tmp_path / "slim").sharing
    assert sharing is not None
    assert sharing.widths is not None
    assert result["slim"] == sharing.slim.sum() > 0
    assert (result["method"], result["budget"]) == ("slim", 0.75)
    assert result["ledger"]["attention_stored"] <= 0.75 * result["ledger"]["attention_dense"]
    rank, columns = sharing.widths.rank[~sharing.dropped], sharing.widths.qk.sum(axis=2)[~sharing.dropped]
    assert f"values {rank.min()} to {rank.max()} of 16, queries and keys {columns.min()}" in result["lines"][0]
    assert result["quality"]["windows"] == 16
    # Before a place, --even takes its own value; the model's widths are even, too.
    for name, even, axes in (("layer", ("--even",), 1), ("model", ("--even", "model"), (0, 1))):
        headshare("share", *even, model, tmp_path / name, *args, "--plot", tmp_path / f"{name}.svg")
        widths = hs.open_checkpoint(tmp_path / name).sharing.widths  # type: ignore[union-attr]
        assert widths is not None
        assert np.array_equal(widths.rank.min(axis=axes), widths.rank.max(axis=axes))
        assert "values and outputs kept" in (tmp_path / f"{name}.svg").read_text()
