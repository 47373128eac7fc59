"""Texts in and out: what the tokenizer makes of them, streams of whole characters, and how a checkpoint is sampled."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_cli_model

import headshare_jax as hs
from headshare_jax import HeadshareError, Sampling, convert, generation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cli_model.saved_without_torch(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> hs.Llama:
    return hs.load(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return hs.load_tokenizer(folder)


def test_a_text_gives_a_text_a_list_a_list_and_ids_give_ids(folder: Path, model: hs.Llama, tokenizer: Any) -> None:
    prompts = [tokenizer(text).input_ids for text in ("Once", "The sea")]
    ids = hs.generate(model, prompts, max_new_tokens=8)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]
    assert [len(answer) for answer in ids] == [8, 8]
    for given in (folder, str(folder), tokenizer):
        assert hs.generate(model, ["Once", "The sea"], tokenizer=given, max_new_tokens=8) == texts
    assert hs.generate(model, "Once", tokenizer=tokenizer, max_new_tokens=8) == texts[0]
    assert "".join(hs.stream(model, "Once", tokenizer=tokenizer, max_new_tokens=8)) == texts[0]
    assert list(hs.stream(model, prompts[0], max_new_tokens=8)) == ids[0]


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ("Once", "tokenizer"),
        (["Once"], "tokenizer"),
        (["Once", [1]], "some of both"),
        ([], "at least one token"),
    ],
)
def test_what_is_no_prompt_is_refused(model: hs.Llama, prompts: Any, reason: str) -> None:
    with pytest.raises(HeadshareError, match=reason):
        hs.generate(model, prompts)


def test_a_text_that_is_none_or_empty_is_refused(model: hs.Llama, tokenizer: Any) -> None:
    with pytest.raises(HeadshareError, match="cannot be tokenized"):
        hs.generate(model, "a\udcff", tokenizer=tokenizer)
    with pytest.raises(HeadshareError, match="at least one token"):
        hs.generate(model, "", tokenizer=tokenizer)


def test_pieces_end_between_characters(tokenizer: Any) -> None:
    text = "naïve Größe, 日本語 🦊👩‍🚀 fin"
    tokens = tokenizer(text).input_ids
    assert len(tokens) == len(text.encode())
    said = list(generation.pieces(tokenizer, tokens))
    assert "".join(said) == text
    assert len(said) == len(text)
    # What breaks off within a character is shown at the end, as the decoder shows it.
    cut = tokenizer("a 🦊").input_ids[:-1]
    assert "".join(generation.pieces(tokenizer, cut)) == tokenizer.decode(cut)
    special = [*tokenizer("a").input_ids, tokenizer.eos_token_id, *tokenizer("b").input_ids]
    assert "".join(generation.pieces(tokenizer, special)) == "ab"


DRAWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 99}


def with_file(folder: Path, to: Path, fields: dict[str, Any]) -> Path:
    """A copy of a model with a generation_config.json."""
    hs.save(hs.load(folder), to, to="hf", tokenizer_from=folder)
    (to / "generation_config.json").write_text(json.dumps(fields))
    return to


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.9}, Sampling()),
        (DRAWN, Sampling(0.6, 20, 0.9)),
        ({"do_sample": True}, Sampling(1.0, 50, 1.0)),
        ({"do_sample": True, "top_k": 0, "temperature": 0.0}, Sampling()),
        ({"do_sample": True, "top_k": None, "top_p": None, "temperature": None}, Sampling(1.0)),
    ],
)
def test_a_checkpoint_is_sampled_as_its_maker_chose(
    tmp_path: Path, folder: Path, fields: dict[str, Any], expected: Sampling
) -> None:
    assert hs.load_sampling(with_file(folder, tmp_path / "model", fields)) == expected


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("temperature", "hot", "number"),
        ("temperature", -1, "at least 0"),
        ("top_k", 2.5, "whole number"),
        ("top_p", True, "number"),
        ("top_p", 7, "at most 1"),
        ("max_new_tokens", "many", "whole number"),
    ],
)
def test_unusable_defaults_are_refused_with_the_files_name(
    tmp_path: Path, folder: Path, name: str, value: Any, reason: str
) -> None:
    path = with_file(folder, tmp_path / "model", {"do_sample": True, name: value})
    with pytest.raises(HeadshareError, match=rf"generation_config\.json.*{reason}") as refused:
        hs.load_sampling(path)
    assert name in str(refused.value)


def test_what_is_given_wins(tmp_path: Path, folder: Path) -> None:
    path = with_file(folder, tmp_path / "model", DRAWN)
    assert generation.chosen(path) == (Sampling(0.6, 20, 0.9), 99)
    assert generation.chosen(path, temperature=0.0, max_new_tokens=5) == (Sampling(0.0, 20, 0.9), 5)
    assert generation.chosen(path, top_k=3, top_p=None) == (Sampling(0.6, 3, 0.9), 99)
    assert generation.chosen(folder, temperature=0.5) == (Sampling(0.5), None)


@pytest.mark.parametrize("to", ["native", "hf", "hf-compact"])
def test_the_file_is_carried_along(tmp_path: Path, folder: Path, to: str) -> None:
    fields = DRAWN | {"eos_token_id": [2, 5], "suppress_tokens": [7]}
    source = hs.open_checkpoint(with_file(folder, tmp_path / "model", fields))
    shared = hs.SharedView(source, hs.sharing_map(hs.match(source), ratio=0.4))
    for number, (weights, tokenizer_from) in enumerate(((shared, None), (hs.Llama.of(shared), tmp_path / "model"))):
        hs.save(weights, tmp_path / f"{number}", to=to, tokenizer_from=tokenizer_from)
        carried = json.loads((tmp_path / f"{number}" / "generation_config.json").read_text())
        assert carried == fields | {"bos_token_id": 1}
        assert hs.load_sampling(tmp_path / f"{number}") == Sampling(0.6, 20, 0.9)
        assert hs.open_checkpoint(tmp_path / f"{number}").config.eos_token_ids == (2, 5)


def test_gguf_keeps_what_it_has_keys_for(tmp_path: Path, folder: Path) -> None:
    source = with_file(folder, tmp_path / "model", DRAWN | {"min_p": 0.05, "repetition_penalty": 1.1})
    for number, path in enumerate((source, tmp_path / "0.gguf")):
        hs.save(hs.open_checkpoint(path), tmp_path / f"{number}.gguf", to="gguf", tokenizer_from=path)
        assert hs.load_sampling(tmp_path / f"{number}.gguf") == Sampling(0.6, 20, 0.9)
    hs.save(hs.open_checkpoint(tmp_path / "1.gguf"), tmp_path / "back", to="hf")
    carried = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    expected = {name: value for name, value in DRAWN.items() if name != "max_new_tokens"}
    assert expected.items() <= carried.items()
    assert carried["min_p"] == 0.05
    hs.save(hs.open_checkpoint(folder), tmp_path / "greedy.gguf", to="gguf", tokenizer_from=folder)
    assert hs.load_sampling(tmp_path / "greedy.gguf") == Sampling()


def test_a_repr_is_a_line_that_a_person_reads(tmp_path: Path, folder: Path, model: hs.Llama) -> None:
    sizes = "3 layers, width 64, 4 query and 2 key/value heads of 16"
    assert repr(model) == f"Llama(llama, {sizes}, 125,760 parameters, float32)"
    sharing = hs.sharing_map(hs.match(model), ratio=0.5)
    view = hs.SharedView(hs.open_checkpoint(folder), sharing)
    counted = hs.ledger(view).stored
    assert repr(view) == f"SharedView(tiny, {sizes}, {counted:,} parameters, float32, of 6 units 3 shared)"
    hs.save(view, tmp_path / "small")
    assert repr(hs.open_checkpoint(tmp_path / "small")).startswith("NativeCheckpoint(small, 3 layers")
    assert repr(hs.load(tmp_path / "small")).endswith("of 6 units 3 shared)")
    assert repr(convert.open_checkpoint(folder)).startswith("TensorCheckpoint(tiny, ")
