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
from headshare_jax.compression import FIT_FILE

TEXT = "The quick brown fox jumps over the lazy dog. " * 20
SMALL: dict[str, Any] = {"calibrate_tokens": 128, "seq_len": 32, "progress": False}
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
        return compress(dense, tokenizer="dense", evaluate="text.txt", **FITTED)


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
    done = compress("dense", tmp_path / "small", to=to, ratio=0.4, tie="qk", match="v", progress=False)
    assert_same_pairs(done.map, hs.sharing_map(hs.match(dense, "v"), 0.4, tie="qk"))
    expected = hs.share(dense, done.map)
    assert_same_weights(hs.load(tmp_path / "small"), expected)
    assert_same_weights(done.model, expected)
    assert (done.path, done.fit, done.record, done.before) == (tmp_path / "small", None, None, None)
    assert done.sizes.disk_bytes == sum(file.stat().st_size for file in done.path.rglob("*") if file.is_file())
    assert hs.load_tokenizer(done.path)("fox").input_ids == hs.load_tokenizer("dense")("fox").input_ids


def test_a_model_in_memory_becomes_another_with_its_settings(folder: Path) -> None:
    model = hs.load("dense", compute_dtype="bfloat16", remat="dots")
    done = compress(model, ratio=0.4, progress=False)
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
    text = {"calibrate": random_tokens((128,)), "method": "refit"} if method == "refit" else {}
    maps: tuple[SharingMap | Path | str, ...] = (sharing, tmp_path / "map.json", str(tmp_path / "map.json"))
    for each in maps:
        done = compress("dense", map=each, **SMALL, **text)
        assert np.array_equal(done.map.donor, sharing.donor)
        assert done.sizes.nominal_saving == hs.ledger(hs.share(dense, sharing)).nominal_saving
        assert (done.fit is not None) == (method == "refit")


def test_a_budget_is_met(folder: Path) -> None:
    text = random_tokens((128,))
    done = compress("dense", method="plan", budget=0.8, calibrate=text, **SMALL)
    assert done.sizes.attention_stored <= 0.8 * done.sizes.attention_dense
    done = compress("dense", method="drop", model_budget=0.9, calibrate=text, **SMALL)
    assert done.sizes.stored <= 0.9 * done.sizes.dense


def test_perplexity_is_measured_before_and_after(folder: Path, dense: Llama, fitted: Compressed) -> None:
    tokens = hs.load_tokenizer("dense")(TEXT).input_ids
    assert isinstance(fitted.model, Llama)
    assert fitted.before == hs.perplexity(dense, tokens, seq_len=32)
    assert fitted.after == hs.perplexity(fitted.model, tokens, seq_len=32)
    assert fitted.before != fitted.after


def test_the_record_shows_itself(fitted: Compressed, folder: Path, tmp_path: Path) -> None:
    assert fitted.before is not None
    shown, sizes = repr(fitted), fitted.sizes
    for told in (
        f"refit: {fitted.map.summary()}", f"{sizes.dense:,} -> {sizes.stored:,}",
        f"{sizes.attention_dense:,} -> {sizes.attention_stored:,}", f"{fitted.before.token_perplexity:.3f} -> ",
    ):  # fmt: skip
        assert told in shown
    assert "written" not in shown
    page = fitted._repr_html_()
    assert page.count("<svg") == page.count("</table>") == 1
    assert f"<td>parameters</td><td>{sizes.dense:,}</td><td>{sizes.stored:,}</td>" in page
    done = compress("dense", tmp_path / "small", ratio=0.4, progress=False)
    assert f"written to {tmp_path / 'small'}" in repr(done)
    assert "perplexity" not in repr(done)


def test_what_was_computed_on_a_text_is_kept_in_the_work_folder(folder: Path, tmp_path: Path) -> None:
    plan = {"method": "plan", "budget": 0.8, "calibrate": "text.txt", "work": tmp_path / "work"}
    steps: list[tuple[str, int, int]] = []

    def told(label: str, done: int, total: int) -> None:
        steps.append((label, done, total))

    first = compress("dense", **SMALL | plan | {"progress": told})
    assert {label for label, _, _ in steps} == {"matching", "refitting"}
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
        compress("dense", ratio=0.4)
        shown = capsys.readouterr()
        compress("dense", ratio=0.4, progress=False)
    assert "matching: 1 of 1" in shown.err
    assert shown.out == ""
    assert capsys.readouterr() == ("", "")


MAP = SharingMap(np.array([[0, 1], [2, 3], [4, 0]]), np.array([[np.nan] * 2, [np.nan] * 2, [np.nan, 0]]), 2)


@pytest.mark.parametrize(
    ("settings", "said", "options"),
    [
        ({}, "Give one of ratio, budget or model_budget", ("ratio", "budget", "model_budget", "map")),
        ({"ratio": 0.3, "budget": 0.9}, "Give only one of", ("ratio", "budget", "model_budget", "map")),
        ({"ratio": 0.3, "map": MAP}, "Give only one of", ("ratio", "budget", "model_budget", "map")),
        ({"ratio": 0.3, "method": "best"}, "must be one of direct, refit", ("method",)),
        ({"ratio": 0.3, "method": "refit"}, "needs a text", ("calibrate",)),
        ({"ratio": 0.3, "calibrate": "text.txt"}, "needs no text", ("calibrate",)),
        ({"ratio": 0.3, "seed": -1, "match": "random"}, "must not be negative", None),
        ({"map": MAP, "tie": "qk"}, "has its pairs already; leave tie out", ("tie",)),
        ({"map": MAP, "method": "plan", "calibrate": "text.txt"}, "leave the map out", ("map",)),
        ({"map": "no-map.json"}, "no-map.json", None),
        ({"budget": 0.9, "method": "plan", "calibrate": "text.txt", "tie": "qk"}, "no use for tie", ("tie",)),
        ({"ratio": 0.3, "work": "work"}, "keeps nothing to go on from", ("work",)),
        ({"ratio": 0.3, "fraction": 1}, "no such setting: .*fraction", ()),
        ({"ratio": 1.0}, "below 1", None),
        ({"ratio": 0.01}, "at least 0.1667", None),
        ({"budget": 0.0}, "must be above 0", None),
        ({"model_budget": 0.1}, "model budget of 0.1 cannot be met", None),
        ({"ratio": 0.3, "within_shards": 4}, "cut evenly", None),
        ({"ratio": 0.3, "method": "refit", "calibrate": "text.txt", "seq_len": 1}, "seq_len must be at least 2", None),
        ({"ratio": 0.3, "method": "refit", "calibrate": "text.txt", "calibrate_tokens": 9999}, "longer text", None),
        ({"ratio": 0.3, "method": "refit", "calibrate": "no-text.txt"}, "no-text.txt", None),
        ({"ratio": 0.3, "method": "refit", "calibrate": np.full(128, 10**6)}, "outside the model's vocabulary", None),
        ({"ratio": 0.3, "evaluate": "no-text.txt"}, "no-text.txt", None),
        ({"ratio": 0.3, "tokenizer": "no-model", "evaluate": "text.txt"}, "no-model", None),
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
    for settings in (FITTED, {"ratio": 0.4, "evaluate": "text.txt", "progress": False}):
        with pytest.raises(HeadshareError, match="needs the tokenizer") as refused:
            compress(dense, **settings)
        assert refused.value.options == ("tokenizer",)


def test_an_output_is_replaced_only_if_asked_and_holds_no_work(folder: Path, tmp_path: Path) -> None:
    compress("dense", tmp_path / "small", ratio=0.4, progress=False)
    with pytest.raises(HeadshareError, match="exists"):
        compress("dense", tmp_path / "small", ratio=0.2, progress=False)
    done = compress("dense", tmp_path / "small", ratio=0.2, overwrite=True, progress=False)
    assert hs.load(tmp_path / "small").sharing == done.map
    with pytest.raises(HeadshareError, match="lies in the output") as refused:
        compress("dense", tmp_path / "other", work=tmp_path / "other", **FITTED)
    assert refused.value.options == ("work",)
    with pytest.raises(HeadshareError, match="does not exist"):
        compress("no-model", ratio=0.4, progress=False)
    with pytest.raises(HeadshareError, match="already shares heads"):
        compress(tmp_path / "small", ratio=0.4, progress=False)
