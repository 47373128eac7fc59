"""One call: what it writes, returns, shows and refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cli_model
from support import random_tokens, sharing_by_hand

import headshare_jax as hs
from headshare_jax import Compressed, HeadshareError, Llama, SharingMap, WeightSource, compress, parameters
from headshare_jax.calibration.own_text import own_text
from headshare_jax.compression.compress import FIT_FILE
from headshare_jax.sharing.widths import Widths

TEXT = "The quick brown fox jumps over the lazy dog. " * 20
SMALL: dict[str, Any] = {"calibrate_tokens": 128, "seq_len": 32, "progress": False, "evaluate": False}
DIRECT: dict[str, Any] = {"method": "direct", "progress": False, "evaluate": False}
FITTED: dict[str, Any] = {"method": "refit", "ratio": 0.4, "calibrate": "text.txt", **SMALL}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `dense`, and a text."""
    folder = tmp_path_factory.mktemp("compress")
    tiny_cli_model.saved_without_torch(folder / "dense", hidden_size=32, intermediate_size=48)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


@pytest.fixture(scope="module")
def dense(made: Path) -> Llama:
    return hs.load(made / "dense")


@pytest.fixture(scope="module")
def fitted(made: Path, dense: Llama) -> Compressed:
    """The model in memory, refitted to the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        return compress(dense, tokenizer="dense", **FITTED | {"evaluate": "text.txt"})


def assert_same_pairs(found: SharingMap | None, expected: SharingMap | None) -> None:
    """The same but for the rounding of scores, which goes by the order in which weights lie in memory."""
    assert found is not None
    assert expected is not None
    assert replace(found, score=expected.score) == expected
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-5)


def assert_same_weights(found: WeightSource, expected: Llama) -> None:
    found = found if isinstance(found, Llama) else Llama.of(found)
    assert_same_pairs(found.sharing, expected.sharing)
    for name in parameters.parameter_names(expected.config):
        np.testing.assert_array_equal(found.array(name), expected.array(name), strict=True, err_msg=name)


@pytest.mark.parametrize("to", ["native", "hf-compact"])
def test_a_model_on_disk_is_matched_shared_and_written(folder: Path, tmp_path: Path, dense: Llama, to: str) -> None:
    done = compress("dense", tmp_path / "small", to=to, ratio=0.4, tie="qk", match="v", **DIRECT)
    assert_same_pairs(done.map, hs.sharing_map(hs.match(dense, "v"), 0.4, tie="qk"))
    expected = hs.share(dense, done.map)
    assert_same_weights(hs.load(tmp_path / "small"), expected)
    assert_same_weights(done.model, expected)
    assert (done.path, done.fit, done.record, done.quality) == (tmp_path / "small", None, None, None)
    assert (
        done.ledger.disk_bytes
        == done.sizes.files[1]
        == sum(file.stat().st_size for file in done.path.rglob("*") if file.is_file())
    )
    assert hs.load_tokenizer(done.path)("fox").input_ids == hs.load_tokenizer("dense")("fox").input_ids


def test_a_model_in_memory_becomes_another_with_its_settings(folder: Path) -> None:
    model = hs.load("dense", compute_dtype="bfloat16", remat="dots")
    done = compress(model, ratio=0.4, **DIRECT)
    assert isinstance(done.model, Llama)
    assert (done.model.compute_dtype, done.model.remat, done.path) == ("bfloat16", "dots", None)
    assert_same_weights(done.model, hs.share(model, done.map))
    assert model.sharing is None


def test_what_is_fitted_to_a_text_is_written_with_its_record(folder: Path, tmp_path: Path, fitted: Compressed) -> None:
    done = compress("dense", tmp_path / "small", **FITTED)
    assert isinstance(fitted.model, Llama)
    assert_same_weights(hs.load(tmp_path / "small"), fitted.model)
    assert done.fit == fitted.fit
    record = json.loads((tmp_path / "small" / FIT_FILE).read_text())
    assert record == json.loads(json.dumps(done.record))
    assert record["calibrate"] == "text.txt"
    assert record["windows"] == 4
    assert all(block["error_after"] <= block["error_before"] for block in record["blocks"])


def test_texts_are_files_or_tokens_and_tokenizers_paths_or_objects(
    folder: Path, dense: Llama, fitted: Compressed
) -> None:
    tokenizer = hs.load_tokenizer("dense")
    tokens = np.asarray(tokenizer(TEXT).input_ids, np.int32)
    assert isinstance(fitted.model, Llama)
    for changes in ({"calibrate": tokens}, {"tokenizer": tokenizer}, {"tokenizer": folder / "dense"}):
        assert_same_weights(compress(dense, **FITTED | changes).model, fitted.model)


@pytest.mark.parametrize("method", ["direct", "refit"])
def test_a_map_that_exists_is_used(folder: Path, tmp_path: Path, dense: Llama, method: str) -> None:
    sharing = sharing_by_hand(dense, "qkvo", {2: 0, 5: 1})
    (tmp_path / "map.json").write_text(sharing.to_json())
    text = SMALL | {"calibrate": random_tokens((128,))} if method == "refit" else DIRECT
    maps: tuple[SharingMap | Path | str, ...] = (sharing, tmp_path / "map.json", str(tmp_path / "map.json"))
    for each in maps:
        done = compress("dense", map=each, **text)
        assert np.array_equal(done.map.donor, sharing.donor)
        assert done.ledger.nominal_saving == hs.ledger(hs.share(dense, sharing)).nominal_saving
        assert (done.fit is not None) == (method == "refit")


def test_a_budget_is_met(folder: Path) -> None:
    text = random_tokens((128,))
    done = compress("dense", budget=0.8, calibrate=text, **SMALL)
    assert done.map.method == "plan"
    assert done.ledger.attention_stored <= 0.8 * done.ledger.attention_dense
    done = compress("dense", method="drop", model_budget=0.9, calibrate=text, **SMALL)
    assert done.ledger.stored <= 0.9 * done.ledger.dense


def test_units_become_slim_and_a_plain_export_of_them_small_again(folder: Path, tmp_path: Path, dense: Llama) -> None:
    slim: dict[str, Any] = {"method": "slim", "budget": 0.7, "calibrate": "text.txt"}
    told: list[str] = []
    done = compress("dense", tmp_path / "slim", **SMALL | slim | {"progress": lambda label, *_: told.append(label)})
    assert list(dict.fromkeys(told)) == ["writing text", "slimming", "writing"]
    assert done.calibration is not None
    assert [(part.name, part.windows) for part in done.calibration.parts] == [
        ("text.txt", 3), ("text that the model wrote", 1),
    ]  # fmt: skip
    assert "of text that the model wrote" in str(done.summary)
    alone = compress("dense", own=0.0, **SMALL | slim).calibration
    assert alone is not None
    assert [part.name for part in alone.parts] == ["text.txt"]
    assert done.map.slim.any()
    assert done.ledger.attention_stored <= 0.7 * done.ledger.attention_dense
    written = hs.load(tmp_path / "slim")
    assert_same_weights(done.model, written)
    assert written.sharing == done.map
    record = json.loads((tmp_path / "slim" / FIT_FILE).read_text())
    assert record == json.loads(json.dumps(done.record))
    assert f"{done.map.slim.sum()} of 6 units are slim" in str(done.summary) or "are dropped" in str(done.summary)
    assert "of 8, queries and keys" in str(done.summary)
    compress("dense", tmp_path / "plain", to="hf", **SMALL | slim)
    quiet: dict[str, Any] = {"progress": False, "evaluate": False}
    again = compress(tmp_path / "plain", tmp_path / "again", map=tmp_path / "plain" / "headshare_map.json", **quiet)
    assert again.map == done.map
    assert_same_weights(hs.load(tmp_path / "again"), written)


def test_both_models_are_measured_on_a_text(folder: Path, dense: Llama, fitted: Compressed) -> None:
    tokens = np.asarray(hs.load_tokenizer("dense")(TEXT).input_ids, np.int32)
    windows_wt = tokens[: len(tokens) // 32 * 32].reshape(-1, 32)
    chosen_wt = windows_wt[np.linspace(0, len(windows_wt) - 1, 16).astype(int)]
    assert isinstance(fitted.model, Llama)
    assert fitted.quality == hs.agreement(dense, fitted.model, chosen_wt)
    assert fitted.quality.ratio != 1


def test_by_default_what_is_left_of_the_text_is_measured_on(folder: Path, dense: Llama, tmp_path: Path) -> None:
    settings = FITTED | {"evaluate": True}
    done = compress("dense", tmp_path / "small", **settings)
    tokens = np.asarray(hs.load_tokenizer("dense")(TEXT).input_ids, np.int32)
    left_wt = tokens[128 : 128 + 16 * 32].reshape(-1, 32)
    assert done.quality == hs.agreement(dense, hs.open_checkpoint(tmp_path / "small"), left_wt)
    assert done.measured_on == "what was not fitted to of text.txt"
    del settings["calibrate_tokens"]
    done = compress("dense", **settings)
    assert done.calibration is not None
    assert (len(done.calibration.windows_wt), len(done.calibration.held_out_wt)) == (25, 3)
    done = compress("dense", **FITTED | {"evaluate": True, "calibrate": tokens[:128]})
    assert done.quality is None
    assert "name another to measure on" in str(done.summary)


def test_a_model_writes_its_own_text(folder: Path, dense: Llama) -> None:
    done = compress("dense", ratio=0.4, calibrate="own", calibrate_tokens=128, seq_len=32, progress=False)
    assert done.map.method == "fitted"
    assert done.calibration is not None
    assert done.calibration.windows_wt.shape == (4, 32)
    written_wt = own_text(dense, 20, 32)
    np.testing.assert_array_equal(done.calibration.windows_wt, written_wt[:4])
    assert done.quality is not None
    assert (done.quality.windows, done.measured_on) == (16, "what was not fitted to of text that the model wrote")
    done = compress("dense", ratio=0.4, method="direct", progress=False)
    assert (done.quality, done.fit) == (None, None)
    assert "there is no text; name one" in str(done.summary)


def test_what_was_quantised_becomes_bfloat16_or_what_is_asked_for(folder: Path, tmp_path: Path) -> None:
    plain = tiny_cli_model.saved_without_torch(tmp_path / "plain", hidden_size=32, intermediate_size=64)
    hs.save(hs.open_checkpoint(plain), tmp_path / "q8.gguf", to="gguf", quantize="q8_0", tokenizer_from=plain)
    types = {}
    for name, more in {"own": {}, "asked": {"dtype": "float16"}, "kept.gguf": {"to": "gguf"}}.items():
        done = compress(tmp_path / "q8.gguf", tmp_path / name, ratio=0.4, **DIRECT, **more)
        types[name] = (done.sizes.type, done.sizes.quantised, done.sizes.note is not None)
    assert types == {
        "own": ("bfloat16", ("q8_0", None), True),
        "asked": ("float16", ("q8_0", None), True),
        "kept.gguf": ("float32", ("q8_0", "q8_0"), False),
    }


def test_the_record_shows_itself_in_five_lines(fitted: Compressed, folder: Path, tmp_path: Path) -> None:
    shown = repr(fitted).splitlines()
    assert [line.partition(" ")[0] for line in shown] == ["in", "size:", "quality:", "took", "next:"]
    assert fitted.map.summary() in shown[0]
    assert f"{fitted.sizes.attention[0] / 1e6:.1f} MB -> {fitted.sizes.attention[1] / 1e6:.1f} MB" in shown[1]
    assert str(fitted.quality) in shown[2]
    page = fitted._repr_html_()
    assert page.count("<svg") == 1
    assert page.count("<br>") == 4
    done = compress("dense", tmp_path / "small", ratio=0.4, **DIRECT)
    shown = repr(done).splitlines()
    assert shown[2] == "quality: not measured"
    assert shown[4] == f"next: headshare chat {tmp_path / 'small'}"


def test_what_was_computed_on_a_text_is_kept_in_the_work_folder(folder: Path, tmp_path: Path) -> None:
    plan = {"method": "plan", "budget": 0.8, "calibrate": "text.txt", "work": tmp_path / "work"}
    steps: list[tuple[str, int, int]] = []

    def told(label: str, done: int, total: int) -> None:
        steps.append((label, done, total))

    first = compress("dense", **SMALL | plan | {"progress": told})
    assert {label for label, _, _ in steps} == {"writing text", "matching", "slimming"}
    assert all(0 < done <= total for _, done, total in steps)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert len(kept) > 3
    steps.clear()
    again = compress("dense", **SMALL | plan | {"progress": told})
    assert "matching" not in {label for label, _, _ in steps}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")} == kept
    assert_same_weights(again.model, Llama.of(first.model))


def test_progress_is_shown_on_standard_error_or_not_at_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headshare_jax.report.progress.SECONDS_BETWEEN_LINES", 0.0)
        compress("dense", ratio=0.4, **DIRECT | {"progress": True})
        shown = capsys.readouterr()
        compress("dense", ratio=0.4, **DIRECT)
    assert "%: matching 1 of 1" in shown.err
    assert shown.out == ""
    assert capsys.readouterr() == ("", "")


MAP = SharingMap(np.array([[0, 1], [2, 3], [4, 0]]), np.array([[np.nan] * 2, [np.nan] * 2, [np.nan, 0]]), 2)

# Two of eight value columns of unit 1.0.
SLIM_MAP = SharingMap(
    np.arange(6).reshape(3, 2), np.full((3, 2), np.nan), 2,
    widths=Widths(np.array([[8, 8], [2, 8], [8, 8]]), np.ones((3, 2, 4), bool), 8),
)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said", "options"),
    [
        ({}, "Give one of ratio, budget or model_budget", ("ratio", "budget", "model_budget", "map")),
        ({"ratio": 0.3, "budget": 0.9}, "Give only one of", ("ratio", "budget", "model_budget", "map")),
        ({"ratio": 0.3, "map": MAP}, "Give only one of", ("ratio", "budget", "model_budget", "map")),
        ({"ratio": 0.3, "method": "best"}, "must be one of direct, refit", ("method",)),
        ({"ratio": 0.3, "method": "direct", "calibrate": "text.txt"}, "leave calibrate out", ("calibrate",)),
        ({"ratio": 0.3, "calibrate": "own", "seq_len": 10**6}, "context of 64", ("seq_len",)),
        ({"ratio": 0.3}, "fitted needs a text .* direct needs none", ("calibrate", "method")),
        ({"map": MAP}, "refit needs a text", ("calibrate", "method")),
        (
            {"ratio": 0.3, "method": "refit", "calibrate": "text.txt", "seed": -1, "match": "random"},
            "must not be negative",
            None,
        ),
        ({"budget": 0.8, "method": "slim"}, "slim needs a text", ("calibrate", "method")),
        ({"ratio": 0.3, "method": "slim", "calibrate": "text.txt"}, "a budget, not a ratio", ("budget", "ratio")),
        ({"ratio": 0.3, "method": "plan", "calibrate": "text.txt"}, "a budget, not a ratio", ("budget", "ratio")),
        ({"budget": 0.8, "calibrate": "text.txt", "even": "layer"}, "plan has no use for even", ("even",)),
        ({"budget": 0.8, "calibrate": "text.txt", "method": "slim", "even": "head"}, "not 'head'", ("even",)),
        ({"map": MAP, "method": "slim", "calibrate": "text.txt"}, "leave the map out", ("map",)),
        ({"map": SLIM_MAP, "calibrate": "text.txt"}, "made with it on a text.* use the method slim", ("map",)),
        (
            {"map": SLIM_MAP, "method": "refit", "calibrate": "text.txt"},
            "made with it on a text.* use the method slim",
            ("map",),
        ),
        (
            {"budget": 0.8, "method": "slim", "calibrate": "text.txt", "calibrate_tokens": 32},
            "at least two windows",
            None,
        ),
        ({"ratio": 0.3, "calibrate": [("text.txt", 0)]}, "must be finite and above 0", ("calibrate",)),
        ({"budget": 0.9, "calibrate": [("text.txt", 1), ("own", 1)], "own": 0.2}, "beside a single text", ("own",)),
        ({"budget": 0.9, "calibrate": "own", "own": 0.2}, "beside a single text", ("own",)),
        ({"budget": 0.9, "calibrate": "text.txt", "own": 1.0}, "at least 0 and below 1", ("own",)),
        ({"map": MAP, "tie": "qk"}, "has its pairs already; leave tie out", ("tie",)),
        ({"map": MAP, "method": "plan", "calibrate": "text.txt"}, "leave the map out", ("map",)),
        ({"calibrate": "text.txt", "map": "no-map.json"}, "no-map.json", None),
        ({"budget": 0.9, "method": "plan", "calibrate": "text.txt", "tie": "qk"}, "no use for tie", ("tie",)),
        ({"ratio": 0.3, "method": "direct", "work": "work"}, "leave work out", ("work",)),
        ({"ratio": 0.3, "fraction": 1}, "no such setting: .*fraction", ()),
        ({"calibrate": "text.txt", "ratio": 1.0}, "below 1", None),
        ({"calibrate": "text.txt", "ratio": 0.01}, "at least 0.1667", None),
        ({"calibrate": "text.txt", "budget": 0.0}, "must be above 0", None),
        ({"calibrate": "text.txt", "model_budget": 0.1}, "model budget of 0.1 cannot be met", None),
        ({"calibrate": "text.txt", "ratio": 0.3, "within_shards": 4}, "cut evenly", None),
        ({"ratio": 0.3, "method": "refit", "calibrate": "text.txt", "seq_len": 1}, "seq_len must be at least 2", None),
        ({"ratio": 0.3, "method": "refit", "calibrate": "text.txt", "calibrate_tokens": 9999}, "longer text", None),
        ({"ratio": 0.3, "method": "refit", "calibrate": "no-text.txt"}, "no-text.txt", None),
        ({"ratio": 0.3, "method": "refit", "calibrate": np.full(128, 10**6)}, "outside the model's vocabulary", None),
        ({"calibrate": "text.txt", "ratio": 0.3, "evaluate": "no-text.txt"}, "no-text.txt", None),
        ({"calibrate": "text.txt", "ratio": 0.3, "tokenizer": "no-model", "evaluate": "text.txt"}, "no-model", None),
        ({"calibrate": "text.txt", "ratio": 0.3, "dtype": "int8"}, "not one of float32", ("dtype",)),
    ],
)
def test_what_does_not_go_together_is_refused(
    folder: Path, tmp_path: Path, settings: dict[str, Any], said: str, options: tuple[str, ...] | None
) -> None:
    with pytest.raises(HeadshareError, match=said) as refused:
        compress("dense", tmp_path / "small", **SMALL | settings)
    assert options is None or refused.value.options == options
    assert not list(tmp_path.iterdir())
    assert not (folder / "work").exists()


def test_a_text_needs_a_tokenizer(dense: Llama, folder: Path) -> None:
    for settings in (FITTED, {"ratio": 0.4, **DIRECT, "evaluate": "text.txt"}):
        with pytest.raises(HeadshareError, match="needs the tokenizer") as refused:
            compress(dense, **settings)
        assert refused.value.options == ("tokenizer",)


def test_an_output_is_replaced_only_if_asked_and_holds_no_work(folder: Path, tmp_path: Path) -> None:
    compress("dense", tmp_path / "small", ratio=0.4, **DIRECT)
    with pytest.raises(HeadshareError, match="exists"):
        compress("dense", tmp_path / "small", ratio=0.2, **DIRECT)
    done = compress("dense", tmp_path / "small", ratio=0.2, overwrite=True, **DIRECT)
    assert hs.load(tmp_path / "small").sharing == done.map
    with pytest.raises(HeadshareError, match="lies in the output") as refused:
        compress("dense", tmp_path / "other", work=tmp_path / "other", **FITTED)
    assert refused.value.options == ("work",)
    with pytest.raises(HeadshareError, match="does not exist"):
        compress("no-model", ratio=0.4, **DIRECT)
    with pytest.raises(HeadshareError, match="already shares heads"):
        compress(tmp_path / "small", ratio=0.4, **DIRECT)
