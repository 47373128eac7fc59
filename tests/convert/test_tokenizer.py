"""Tokenizers: carried as they are, or rebuilt from GGUF metadata and compared with the ones they were."""

import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_cli_model
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from support import saved_hf_model, tiny_hf_model
from support_gguf import write_gguf
from tokenizers import decoders, models, pre_tokenizers, trainers

import headshare_jax
from headshare_jax import HeadshareError, cli
from headshare_jax.convert import FORMATS, gguf_tokenizer, locate, tokenizer
from headshare_jax.convert.gguf_header import GgufHeader

CORPUS = [
    "The heads of a model share weights, and the model's heads are fewer: it's smaller.",
    "In 1998, 2 of 31 heads were  shared;\n\n\tthe others (29) weren't. What a share!",
    "Größe, naïve, 東京, emoji 🙂 and <tags> too -- low lower lowest newer wider.",
] * 4
WORDS = " ".join(CORPUS).split(" ")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def header(metadata: dict[str, Any]) -> GgufHeader:
    return GgufHeader(Path("model.gguf"), {f"tokenizer.{name}": value for name, value in metadata.items()}, {})


def loaded(folder: Path, metadata: dict[str, Any]) -> Any:
    gguf_tokenizer.write(header(metadata), folder)
    return tokenizer.load(folder)


# Byte-level tokenizers (GPT-2's, Llama 3's).


@pytest.fixture(scope="module")
def byte_level() -> tokenizers.Tokenizer:
    """A tokenizer with the words of GPT-2 and two special tokens, trained on a few sentences."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=alphabet)
    trained.train_from_iterator(CORPUS, trainer)
    return trained


@pytest.fixture(scope="module")
def byte_level_metadata(byte_level: tokenizers.Tokenizer) -> dict[str, Any]:
    model = json.loads(byte_level.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": [CONTROL if token.startswith("<|") else NORMAL for token in tokens],
        "ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "chat_template": "{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}",
    }


@pytest.fixture(scope="module")
def byte_level_loaded(tmp_path_factory: pytest.TempPathFactory, byte_level_metadata: dict[str, Any]) -> Any:
    return loaded(tmp_path_factory.mktemp("tokenizer"), byte_level_metadata)


@given(text=st.one_of(st.text(), st.lists(st.sampled_from([*WORDS, "<|end|>"])).map(" ".join)))
def test_a_byte_level_tokenizer_is_the_one_it_was(
    byte_level: tokenizers.Tokenizer, byte_level_loaded: Any, text: str
) -> None:
    ids = byte_level_loaded(text).input_ids
    assert ids == byte_level.encode(text).ids
    assert byte_level_loaded.decode(ids) == text


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", "Ġ2024", "!!", "ĊĠĊ", "Ġok", "Ġ"]),
        ("smollm", ["It", "'s", "Ġ", "2", "0", "2", "4", "!!", "ĊĠĊ", "Ġok", "Ġ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "202", "4", "!!Ċ", "ĠĊ", "Ġok", "Ġ"]),
        ("tekken", ["It", "'s", "Ġ", "2", "0", "2", "4", "!!Ċ", "ĠĊ", "Ġok", "Ġ"]),
    ],
)
def test_words_are_cut_as_each_family_does(
    tmp_path: Path, byte_level_metadata: dict[str, Any], pre: str, words: list[str]
) -> None:
    backend = loaded(tmp_path, byte_level_metadata | {"ggml.pre": pre}).backend_tokenizer
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("It's 2024!!\n \n ok ")] == words


@pytest.mark.parametrize(
    ("pre", "says", "first"),
    [
        ("gpt-2", {}, False),
        ("gpt-2", {"ggml.add_bos_token": True}, True),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"ggml.add_bos_token": False}, False),
    ],
)
def test_the_first_token_is_added_where_the_model_expects_it(
    tmp_path: Path, byte_level_metadata: dict[str, Any], pre: str, says: dict[str, Any], first: bool
) -> None:
    words = loaded(tmp_path, byte_level_metadata | {"ggml.pre": pre} | says)
    assert (words("the model").input_ids[0] == 0) == first
    assert words("the model", add_special_tokens=False).input_ids[0] != 0


def test_special_tokens_and_the_chat_template(byte_level_loaded: Any) -> None:
    assert (byte_level_loaded.bos_token, byte_level_loaded.eos_token) == ("<|begin|>", "<|end|>")
    assert byte_level_loaded.decode([0, *byte_level_loaded("model").input_ids, 1], skip_special_tokens=True) == "model"
    ids = tokenizer.chat_message(byte_level_loaded, "the model")
    assert ids == [0, *byte_level_loaded("the model").input_ids, 1]


# SentencePiece tokenizers (LLaMA's and Llama 2's).


def sentencepiece_metadata() -> dict[str, Any]:
    """Pieces learned from a few sentences, scored in the order in which they are joined."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300))
    model = json.loads(trained.to_str())["model"]
    joined = ["".join(pair) for pair in model["merges"]]
    letters = [token for token in model["vocab"] if token not in joined]
    special = ["<unk>", "<s>", "</s>", "<think>"]
    rows = [(token, 0.0, kind) for token, kind in zip(special, (UNKNOWN, CONTROL, CONTROL, USER_DEFINED), strict=True)]
    rows += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    rows += [(token, -1.0 - rank, NORMAL) for rank, token in enumerate(dict.fromkeys(joined))]
    rows += [(token, -1000.0 - rank, NORMAL) for rank, token in enumerate(letters)]
    tokens, scores, kinds = zip(*rows, strict=True)
    return {
        "ggml.model": "llama",
        "ggml.tokens": list(tokens),
        "ggml.scores": list(scores),
        "ggml.token_type": list(kinds),
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="module")
def pieces() -> dict[str, Any]:
    return sentencepiece_metadata()


@pytest.fixture(scope="module")
def sentencepiece_loaded(tmp_path_factory: pytest.TempPathFactory, pieces: dict[str, Any]) -> Any:
    return loaded(tmp_path_factory.mktemp("tokenizer"), pieces)


def joined_greedily(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's own algorithm: join the neighbours whose whole scores best, leftmost first; then spell bytes."""
    tokens = metadata["ggml.tokens"]
    rows = zip(tokens, metadata["ggml.scores"], metadata["ggml.token_type"], strict=True)
    scores = {token: score for token, score, kind in rows if kind == NORMAL}
    parts = list(text)
    while True:
        wholes = [(-scores[a + b], place) for place, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not wholes:
            break
        _, place = min(wholes)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    spelled = [[part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [tokens.index(token) for part in spelled for token in part]


@given(text=st.one_of(st.text(), st.lists(st.sampled_from(WORDS)).map(" ".join)))
def test_a_sentencepiece_tokenizer_joins_by_score(pieces: dict[str, Any], sentencepiece_loaded: Any, text: str) -> None:
    # These are found whole.
    assume(not any(special in text for special in ("<s>", "</s>", "<think>")))
    ids = sentencepiece_loaded(text).input_ids
    assert ids == [1, *joined_greedily(("\u2581" + text).replace(" ", "\u2581") if text else "", pieces)]
    assert sentencepiece_loaded.decode(ids, skip_special_tokens=True) == text.replace("\u2581", " ")


def test_user_defined_pieces_are_found_whole(sentencepiece_loaded: Any) -> None:
    assert 3 in sentencepiece_loaded("the <think> head").input_ids
    assert "<think>" in sentencepiece_loaded.decode(
        sentencepiece_loaded("a<think>b").input_ids, skip_special_tokens=True
    )


def test_without_a_space_before_the_text(tmp_path: Path, pieces: dict[str, Any]) -> None:
    words = loaded(tmp_path, pieces | {"ggml.add_space_prefix": False, "ggml.add_bos_token": False})
    ids = words("the model").input_ids
    assert ids == joined_greedily("the\u2581model", pieces)
    assert words.decode(ids) == "the model"


# What cannot be used.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ggml.model": "bert"}, "it is of kind 'bert'; gpt2 and llama are supported"),
        ({"ggml.pre": "viking"}, "it cuts words in the way named 'viking', which is not supported"),
        ({"ggml.merges": ["no such"]}, ""),
        ({"ggml.merges": ["nopair"]}, ""),
        ({"ggml.token_type": [1]}, ""),
        ({"ggml.tokens": 7}, ""),
    ],
    ids=str,
)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    tmp_path: Path, byte_level_metadata: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(HeadshareError, match=f"The tokenizer in model.gguf cannot be used: .*{reason}"):
        gguf_tokenizer.write(header(byte_level_metadata | change), tmp_path)
    assert list(tmp_path.iterdir()) == []


def gguf_with(path: Path, metadata: dict[str, Any]) -> Path:
    return write_gguf(path, tiny_hf_model(), metadata={f"tokenizer.{name}": value for name, value in metadata.items()})


def test_a_gguf_tokenizer_travels_through_every_format(tmp_path: Path, pieces: dict[str, Any]) -> None:
    source = gguf_with(tmp_path / "gguf.gguf", pieces)
    text = "the heads share weights"
    expected = tokenizer.load(source)(text).input_ids
    assert expected == [1, *joined_greedily("\u2581" + text.replace(" ", "\u2581"), pieces)]
    for name, to in {"native": "native", "hf": "hf", "again": "native"}.items():
        headshare_jax.save(headshare_jax.open_checkpoint(source), tmp_path / name, to=to, tokenizer_from=locate(source))
        source = tmp_path / name
        assert tokenizer.load(source)(text).input_ids == expected


def test_a_tokenizer_of_a_gguf_file_found_in_a_folder_is_carried(tmp_path: Path, pieces: dict[str, Any]) -> None:
    (tmp_path / "in").mkdir()
    gguf_with(tmp_path / "in" / "model.gguf", pieces)
    path = locate(tmp_path / "in")
    headshare_jax.save(headshare_jax.open_checkpoint(path), tmp_path / "out", tokenizer_from=path)
    assert tokenizer.load(tmp_path / "out")("the").input_ids[0] == 1


def test_an_unusable_gguf_tokenizer_does_not_hinder_a_conversion(
    tmp_path: Path, pieces: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = gguf_with(tmp_path / "model.gguf", pieces | {"ggml.model": "bert"})
    with caplog.at_level(logging.WARNING):
        headshare_jax.save(headshare_jax.open_checkpoint(path), tmp_path / "out", tokenizer_from=path)
    assert "it is of kind 'bert'; gpt2 and llama are supported. The output is left without one." in caplog.text
    with pytest.raises(HeadshareError, match="out carries no tokenizer"):
        tokenizer.load(tmp_path / "out")


def test_a_checkpoint_without_a_tokenizer_gives_one_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model())
    headshare_jax.save(headshare_jax.open_checkpoint(path), tmp_path / "out", tokenizer_from=path)
    assert not caplog.text
    with pytest.raises(HeadshareError, match="cannot be used: it is of kind None"):
        tokenizer.load(path)


@pytest.mark.parametrize("to", ["native", "hf"])
def test_tokenizer_files_are_carried_unchanged(tmp_path: Path, byte_level: tokenizers.Tokenizer, to: str) -> None:
    folder = saved_hf_model(tmp_path / "hf")
    byte_level.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "notes.txt").write_text("stays behind")
    headshare_jax.save(headshare_jax.open_checkpoint(folder), tmp_path / "out", to=to, tokenizer_from=folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert tokenizer.load(tmp_path / "out")("the model").input_ids == byte_level.encode("the model").ids


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(HeadshareError, match=r"The tokenizer of .* cannot be used: EOF"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("given", [str, Path, headshare_jax.load_tokenizer], ids=["str", "Path", "object"])
def test_a_saved_model_with_its_tokenizer_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: Callable[[Path], Any], to: str
) -> None:
    folder = tiny_cli_model.saved(tmp_path / "model")
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    headshare_jax.save(headshare_jax.load(folder), out, to=to, tokenizer_from=given(folder))
    answers = []
    for path in (folder, out):
        words = ["generate", str(path), "--prompt", "Hello", "--max-new-tokens", "4", "--chat", "--json"]
        assert cli.run(words) == 0
        answers.append(json.loads(capsys.readouterr().out)["results"])
    assert answers[0] == answers[1]


def test_a_tokenizer_does_not_say_whether_there_was_a_network(tmp_path: Path) -> None:
    loaded = headshare_jax.load_tokenizer(tiny_cli_model.saved(tmp_path / "model"))
    loaded.init_kwargs["local_files_only"] = True
    tokenizer.save(loaded, tmp_path / "out")
    assert '"local_files_only": true' not in (tmp_path / "out" / "tokenizer_config.json").read_text()
