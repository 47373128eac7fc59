"""Models, tokenizers and texts by name."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny_cli_model
from support import random_tokens, tiny_model

import headshare_jax as hs
from headshare_jax import HeadshareError, loading, parameters
from headshare_jax.calibration.windows import turns

TEXT = "The quick brown fox jumps over the lazy dog. " * 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    tiny_cli_model.saved_without_torch(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_a_model_is_stored_in_the_type_that_is_asked_for(folder: Path, dtype: str | None) -> None:
    dense = hs.load(folder / "model")
    for source in (folder / "model", str(folder / "model"), hs.open_checkpoint(folder / "model")):
        model = hs.load(source, dtype=dtype, compute_dtype="bfloat16", remat="full")
        assert (model.compute_dtype, model.remat) == ("bfloat16", "full")
        for name in parameters.parameter_names(model.config):
            expected = np.asarray(dense.array(name)).astype(dtype or "float32")
            np.testing.assert_array_equal(model.array(name), expected, strict=True)


def test_an_unknown_type_is_refused(folder: Path) -> None:
    with pytest.raises(HeadshareError, match="'int8' is not one of"):
        hs.load(folder / "model", dtype="int8")


def test_a_tokenizer_is_found_beside_any_kind_of_model(folder: Path, tmp_path: Path) -> None:
    expected = hs.load_tokenizer(folder / "model")(TEXT).input_ids
    hs.save(hs.load(folder / "model"), tmp_path / "native", tokenizer_from=folder / "model")
    assert hs.load_tokenizer(str(tmp_path / "native"))(TEXT).input_ids == expected
    hs.save(tiny_model(), tmp_path / "without")
    with pytest.raises(HeadshareError, match="tokenizer"):
        hs.load_tokenizer(tmp_path / "without")
    with pytest.raises(HeadshareError, match="does not exist"):
        hs.load_tokenizer(tmp_path / "nothing")


def vocabulary(size: int) -> hs.LlamaConfig:
    return dataclasses.replace(tiny_model().config, vocab_size=size)


def test_a_calibration_text_is_its_first_windows(folder: Path) -> None:
    tokenizer = hs.load_tokenizer(folder / "model")
    tokens = np.asarray(tokenizer(TEXT).input_ids)
    for each in (tokenizer, folder / "model", str(folder / "model")):
        text = loading.calibration_text(folder / "text.txt", each, 70, 32, vocabulary(tokenizer.vocab_size))
        np.testing.assert_array_equal(text.windows_wt, tokens[:64].reshape(2, 32).astype(np.int32), strict=True)
        assert text.name == str(folder / "text.txt")
        np.testing.assert_array_equal(loading.text_tokens(folder / "text.txt", each), tokens.astype(np.int32))


def test_token_ids_are_a_text_without_a_tokenizer() -> None:
    tokens = random_tokens((100,))
    text = loading.calibration_text(tokens, None, 64, 32, vocabulary(160))
    np.testing.assert_array_equal(text.windows_wt, tokens[:64].reshape(2, 32))
    other = loading.calibration_text(tokens[1:], None, 64, 32, vocabulary(160))
    assert text.digest != other.digest
    np.testing.assert_array_equal(
        loading.calibration_text(tokens[:96].reshape(3, 32), None, 64, 32, vocabulary(160)).windows_wt, text.windows_wt
    )
    assert text.digest == loading.calibration_text(tokens[:64], None, 64, 32, vocabulary(160)).digest


def test_what_is_no_text_is_refused(folder: Path) -> None:
    tokens = random_tokens((100,))
    with pytest.raises(HeadshareError, match="at least 2"):
        loading.calibration_text(tokens, None, 64, 1, vocabulary(160))
    with pytest.raises(HeadshareError, match="longer text"):
        loading.calibration_text(tokens, None, 128, 32, vocabulary(160))
    with pytest.raises(HeadshareError, match="vocabulary of 100"):
        loading.calibration_text(tokens, None, 64, 32, vocabulary(100))
    with pytest.raises(HeadshareError, match="needs the tokenizer"):
        loading.calibration_text(folder / "text.txt", None, 64, 32, vocabulary(160))
    with pytest.raises(HeadshareError, match=r"no-text\.txt"):
        loading.text_tokens(folder / "no-text.txt", folder / "model")


def test_several_texts_take_turns_by_their_weights(folder: Path) -> None:
    tokenizer = hs.load_tokenizer(folder / "model")
    (folder / "other.txt").write_text("A slow green turtle creeps under the busy cat. " * 10)
    names = [str(folder / "text.txt"), str(folder / "other.txt")]
    fox, turtle = (np.asarray(tokenizer(Path(name).read_text()).input_ids, np.int32) for name in names)
    fox_wt, turtle_wt = (each[: 12 * 32].reshape(12, 32) for each in (fox, turtle))
    text = loading.calibration_text(
        [(names[0], 1), (names[1], 3.0)], tokenizer, 8 * 32, 32, vocabulary(tokenizer.vocab_size), held_out=4
    )
    expected = [fox_wt[:2], turtle_wt[:6]]
    for part, windows_wt, held_out_wt in zip(text.parts, expected, [fox_wt[2:3], turtle_wt[6:9]], strict=True):
        np.testing.assert_array_equal(part.windows_wt, windows_wt, strict=True)
        np.testing.assert_array_equal(part.held_out_wt, held_out_wt, strict=True)
    for place, part_wt in enumerate(expected):
        np.testing.assert_array_equal(text.windows_wt[turns([1, 3], 8) == place], part_wt)
    np.testing.assert_array_equal(text.held_out_wt, np.concatenate([fox_wt[2:3], turtle_wt[6:9]]))
    assert text.name == " and ".join(names)
    told = text.to_json()
    assert told["windows"] == [8, 32]
    assert [(each["name"], each["weight"], each["windows"]) for each in told["texts"]] == [
        (names[0], 1.0, 2), (names[1], 3.0, 6),
    ]  # fmt: skip
    # Which of them a text was in is told by name.
    seen = text.overlap(fox[: 2 * 32], 32)
    assert (seen.seen, seen.texts) == (2, (names[0],))
    assert f"({names[0]})" in seen.sentence()
    assert text.overlap(np.zeros(64, np.int32), 32).texts == ()


def test_what_is_held_out_ends_where_one_of_the_texts_does() -> None:
    long, short = random_tokens((40 * 32,)), random_tokens((6 * 32,))
    text = loading.calibration_text([(long, 1), (short, 1)], None, 8 * 32, 32, vocabulary(160), held_out=16)
    assert [len(part.windows_wt) for part in text.parts] == [4, 4]
    assert [len(part.held_out_wt) for part in text.parts] == [3, 2]
    np.testing.assert_array_equal(text.parts[1].held_out_wt, short[4 * 32 :].reshape(2, 32))


@pytest.mark.parametrize(("windows", "count", "kept", "own"), [(40, 24 * 32, 18, 6), (8, None, 7, 2), (2, 64, 2, 0)])
def test_beside_a_single_text_the_model_writes_a_part(windows: int, count: int | None, kept: int, own: int) -> None:
    tokens = random_tokens((windows * 32,))
    text = loading.calibration_text(tokens, None, count, 32, tiny_model().config, held_out=4, own=0.25)
    assert [part.windows for part in text.parts] == [kept, own][: 1 + bool(own)]
    assert text.to_write == own
    text = loading.write_own(text, tiny_model(), 32)
    assert text.windows_wt.shape == (kept + own, 32)
    np.testing.assert_array_equal(text.parts[0].windows_wt, tokens[: kept * 32].reshape(-1, 32))
    # What is measured on is never what the model wrote.
    left = tokens[kept * 32 :].reshape(-1, 32)[:4]
    np.testing.assert_array_equal(text.held_out_wt, left[: text.held_out])


def test_texts_that_cannot_be_mixed_are_refused_by_name(folder: Path) -> None:
    tokens, name = random_tokens((6 * 32,)), str(folder / "text.txt")
    cases: list[tuple[object, str]] = [
        ([(tokens, 1), (tokens, 0)], "weight of token ids must be finite and above 0, not 0"),
        ([(tokens, 1), (name, -2)], r"weight of .*text\.txt must be finite and above 0, not -2"),
        ([(tokens, 1), (name, float("nan"))], r"weight of .*text\.txt must be finite"),
        ([(tokens, 1), (name, "much")], "pairs of a text and its weight"),
        ([name, name], "pairs of a text and its weight"),
        ([(name, 1), (name, 2)], r"text\.txt twice; give it once"),
        ([], "names no text"),
        ([(tokens, 3), (name, 1)], "Of 12 windows of 32 tokens 9 are to come from token ids .* which has 6"),
        ([(name, 1), (tokens[:32], 1e-6)], r"None of 12 windows comes from token ids"),
    ]
    for texts, said in cases:
        with pytest.raises(HeadshareError, match=said) as refused:
            loading.calibration_text(texts, folder / "model", 12 * 32, 32, vocabulary(300))  # type: ignore[arg-type]
        assert refused.value.options[0] == "calibrate"
