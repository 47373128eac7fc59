"""Models, tokenizers and texts by name."""

from pathlib import Path

import numpy as np
import pytest
import tiny_cli_model
from support import random_tokens, tiny_model

import headshare_jax as hs
from headshare_jax import HeadshareError, loading, parameters

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


def test_a_calibration_text_is_its_first_windows(folder: Path) -> None:
    tokenizer = hs.load_tokenizer(folder / "model")
    tokens = np.asarray(tokenizer(TEXT).input_ids)
    for each in (tokenizer, folder / "model", str(folder / "model")):
        text = loading.calibration_text(folder / "text.txt", each, 70, 32, tokenizer.vocab_size)
        np.testing.assert_array_equal(text.windows_wt, tokens[:64].reshape(2, 32).astype(np.int32), strict=True)
        assert text.name == str(folder / "text.txt")
        np.testing.assert_array_equal(loading.text_tokens(folder / "text.txt", each), tokens.astype(np.int32))


def test_token_ids_are_a_text_without_a_tokenizer() -> None:
    tokens = random_tokens((100,))
    text = loading.calibration_text(tokens, None, 64, 32, 160)
    np.testing.assert_array_equal(text.windows_wt, tokens[:64].reshape(2, 32))
    other = loading.calibration_text(tokens[1:], None, 64, 32, 160)
    assert text.digest != other.digest
    assert text.digest == loading.calibration_text(tokens[:64], None, 64, 32, 160).digest


def test_what_is_no_text_is_refused(folder: Path) -> None:
    tokens = random_tokens((100,))
    with pytest.raises(HeadshareError, match="at least 2"):
        loading.calibration_text(tokens, None, 64, 1, 160)
    with pytest.raises(HeadshareError, match="longer text"):
        loading.calibration_text(tokens, None, 128, 32, 160)
    with pytest.raises(HeadshareError, match="vocabulary of 100"):
        loading.calibration_text(tokens, None, 64, 32, 100)
    with pytest.raises(HeadshareError, match="needs the tokenizer"):
        loading.calibration_text(folder / "text.txt", None, 64, 32, 160)
    with pytest.raises(HeadshareError, match=r"no-text\.txt"):
        loading.text_tokens(folder / "no-text.txt", folder / "model")
