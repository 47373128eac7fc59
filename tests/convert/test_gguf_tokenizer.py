"""Tokenizers as GGUF metadata: what is written, and that reading it gives the tokenizer that it was."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import hf_config, tiny_hf_model, tiny_model
from support_gguf import write_gguf
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import headshare_jax as hs
from headshare_jax import HeadshareError, LlamaConfig
from headshare_jax.convert import gguf_tokenizer, gguf_vocabulary, gguf_words, tokenizer
from headshare_jax.convert.gguf_header import GgufHeader, read_header

CORPUS = [
    "The heads of a model share weights, and the MODEL'S heads are fewer: it's smaller, They'Ll see.",
    "In 1998, 2 of 31 heads were  shared;\n\n\tthe others (29) weren't. What a share! 123456 7,890",
    "Größe, naïve ÉTÉ, 東京, emoji 🙂 and <tags> too -- low lower lowest newer wider. a/b\n/c",
] * 4
WORDS = " ".join(CORPUS).split(" ")
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from([*WORDS, "<|end|>", "<tool>", "\n", " "])).map(" ".join))
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BEGIN_FIRST = processors.TemplateProcessing(
    single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", 0)]
)
CONFIG = LlamaConfig(
    vocab_size=700, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
    max_position_embeddings=64, eos_token_ids=(1,),
)  # fmt: skip


def byte_level(
    rule: pre_tokenizers.PreTokenizer, *, whole_words: bool = False, begin_first: bool = False
) -> tokenizers.Tokenizer:
    trained = tokenizers.Tokenizer(models.BPE(ignore_merges=whole_words))
    trained.pre_tokenizer = rule
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=alphabet)
    trained.train_from_iterator(CORPUS, trainer)
    trained.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<|fim|>", normalized=False)])
    if begin_first:
        trained.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), BEGIN_FIRST])
    return trained


def sentencepiece(
    normalizer: normalizers.Normalizer | None = None, words: pre_tokenizers.PreTokenizer | None = None
) -> tokenizers.Tokenizer:
    """Pieces as SentencePiece learns them, spelled out in bytes where there is none."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, limit_alphabet=60))
    parts = json.loads(trained.to_str())
    made = tokenizers.Tokenizer.from_str(
        json.dumps(parts | {"pre_tokenizer": None, "normalizer": None, "added_tokens": parts["added_tokens"][:3]})
    )
    prefixed = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.normalizer = normalizer or (None if words else prefixed)
    made.pre_tokenizer = words
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    made.add_tokens([AddedToken("<|end|>", normalized=False, special=True), AddedToken("<tool>", normalized=False)])
    return made


def wrapped(made: tokenizers.Tokenizer, **changes: Any) -> PreTrainedTokenizerFast:
    special = ("<s>", "</s>", "<unk>") if "<s>" in made.get_vocab() else ("<|begin|>", "<|end|>", None)
    names = dict(zip(("bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names | changes)


def written(made: tokenizers.Tokenizer, config: Any = CONFIG, **changes: Any) -> dict[str, Any]:
    """What a GGUF file says of a tokenizer, without the beginning of the names."""
    values = gguf_vocabulary.metadata(wrapped(made, **changes), config)
    return {name.removeprefix("tokenizer.").removeprefix("ggml."): value for name, value in values.items()}


def read_back(values: dict[str, Any], folder: Path, architecture: str = "llama") -> Any:
    names = {name if name.startswith("chat_") else f"ggml.{name}": value for name, value in values.items()}
    metadata = {"general.architecture": architecture} | {f"tokenizer.{name}": value for name, value in names.items()}
    gguf_tokenizer.write(GgufHeader(Path("model.gguf"), metadata, {}), folder)
    return tokenizer.load(folder)


# Byte-level tokenizers.


@pytest.mark.parametrize(
    ("name", "begin_first"),
    [
        ("gpt-2", False),
        ("smollm", False),
        ("llama-bpe", True),
        ("llama-bpe", False),
        ("dbrx", False),
        ("tekken", True),
        ("qwen2", False),
        ("qwen35", False),
        ("gpt-4o", True),
    ],
)
def test_a_byte_level_tokenizer_goes_into_gguf_and_back(tmp_path: Path, name: str, begin_first: bool) -> None:
    whole_words = name in gguf_words.WHOLE_WORDS
    made = byte_level(gguf_words.RULES[name], whole_words=whole_words, begin_first=begin_first)
    if name in gguf_words.COMPOSED:
        made.normalizer = normalizers.NFC()
    values = written(made)
    assert (values["model"], values["pre"], values["add_bos_token"]) == ("gpt2", name, begin_first)
    back = read_back(values, tmp_path)

    @given(text=TEXTS)
    @settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
    def equal(text: str) -> None:
        assert back(text).input_ids == made.encode(text).ids

    equal()
    assert gguf_vocabulary.metadata(back, CONFIG) == {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def test_what_is_written_of_a_byte_level_tokenizer() -> None:
    made = byte_level(gguf_words.RULES["smollm"])
    size = made.get_vocab_size()
    values = written(made, chat_template="{{ messages }}", pad_token="<|end|>")
    assert values["tokens"][:2] == ["<|begin|>", "<|end|>"]
    assert values["tokens"][size - 2 :] == ["<tool>", "<|fim|>", *(f"[PAD{id}]" for id in range(size, 700))]
    # A token that looks like a control token is one, whatever the tokenizer calls it.
    kinds = [CONTROL, CONTROL, *[NORMAL] * (size - 4), USER_DEFINED, CONTROL, *[UNUSED] * (700 - size)]
    assert values["token_type"] == kinds
    assert values["merges"] == [" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    ids = {name: id for name, id in values.items() if name.endswith("_id")}
    assert ids == {"bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 1}
    assert values["chat_template"] == "{{ messages }}"
    assert "scores" not in values


def test_the_model_names_the_tokens_that_the_tokenizer_does_not() -> None:
    made = byte_level(gguf_words.RULES["gpt-2"])
    config = replace(CONFIG, bos_token_id=0, eos_token_ids=(5, 6, 1), pad_token_id=7)
    values = written(made, config, bos_token=None, eos_token=None)
    assert {name: id for name, id in values.items() if name.endswith("_id")} == {
        "bos_token_id": 0, "eos_token_id": 5, "eot_token_id": 6, "eom_token_id": 1, "padding_token_id": 7,
    }  # fmt: skip
    assert written(made, config)["eos_token_id"] == 1


def test_a_text_is_ended_where_the_tokenizer_ends_it(tmp_path: Path) -> None:
    made = byte_level(gguf_words.RULES["qwen2"])
    made.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 1)])
    values = written(made)
    assert (values["add_bos_token"], values["add_eos_token"]) == (False, True)
    assert read_back(values, tmp_path)("the model").input_ids == made.encode("the model").ids


def test_several_chat_templates(tmp_path: Path) -> None:
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    values = written(byte_level(gguf_words.RULES["gpt-2"]), chat_template=templates)
    assert (values["chat_template"], values["chat_template.tool_use"]) == ("{{ messages }}", "{{ tools }}")
    assert read_back(values, tmp_path).chat_template == templates


def test_tokens_beyond_the_models_vocabulary_are_left_out() -> None:
    made = byte_level(gguf_words.RULES["gpt-2"])
    size = made.get_vocab_size() - 1
    values = written(made, replace(CONFIG, vocab_size=size), pad_token="<|fim|>")
    assert values["tokens"][-1] == "<tool>"
    assert "padding_token_id" not in values


# SentencePiece-like tokenizers.


@pytest.mark.parametrize(
    ("made", "prefix"),
    [
        (sentencepiece(), True),
        (sentencepiece(normalizers.Replace(" ", "\u2581")), False),
        (sentencepiece(words=pre_tokenizers.Metaspace(prepend_scheme="never", split=False)), False),
    ],
    ids=["Llama 2", "without a space before", "Metaspace"],
)
def test_a_sentencepiece_tokenizer_goes_into_gguf_and_back(
    tmp_path: Path, made: tokenizers.Tokenizer, prefix: bool
) -> None:
    values = written(made)
    assert (values["model"], values["pre"], values["add_space_prefix"]) == ("llama", "default", prefix)
    back = read_back(values, tmp_path)

    @given(text=TEXTS)
    @settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
    def equal(text: str) -> None:
        assert back(text).input_ids == made.encode(text).ids

    equal()
    assert gguf_vocabulary.metadata(back, CONFIG) == {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def test_what_is_written_of_a_sentencepiece_tokenizer() -> None:
    made = sentencepiece()
    values = written(made)
    rows = dict(zip(values["tokens"], zip(values["token_type"], values["scores"], strict=True), strict=True))
    assert [rows[name][0] for name in ("<unk>", "<s>", "<|end|>", "<tool>")] == [
        UNKNOWN,
        CONTROL,
        CONTROL,
        USER_DEFINED,
    ]
    assert rows["<0x41>"] == (BYTE, 0.0)
    assert rows["[PAD699]"] == (UNUSED, -10000.0)
    wholes = ["".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    assert [rows[whole] for whole in wholes] == [(NORMAL, -float(rank)) for rank in range(len(wholes))]
    letters = [score for token, (kind, score) in rows.items() if kind == NORMAL and token not in wholes]
    assert max(letters) < -len(wholes) + 1
    assert "merges" not in values


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_space_before_the_text_is_seen_however_it_is_said(scheme: str) -> None:
    made = sentencepiece(words=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))
    assert written(made)["add_space_prefix"] is True


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_family_keeps_its_tokenizer_in_every_format(tmp_path: Path, family: str) -> None:
    """transformers reads a class's tokenizer in ways that the family decides, which shows after special tokens."""
    wrapped(sentencepiece(), legacy=False).save_pretrained(tmp_path / "hf")
    config_path = tmp_path / "hf" / "tokenizer_config.json"
    named = json.loads(config_path.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}
    config_path.write_text(json.dumps(named))
    hs.save(tiny_model(model_type=family), tmp_path / "model", to="hf")
    shutil.copyfile(tmp_path / "model" / "config.json", tmp_path / "hf" / "config.json")
    expected = AutoTokenizer.from_pretrained(tmp_path / "hf")("<|end|>b").input_ids
    for to in ("native", "hf-compact"):
        hs.save(tiny_model(model_type=family), tmp_path / to, to=to, tokenizer_from=tmp_path / "hf")
        assert tokenizer.load(tmp_path / to)("<|end|>b").input_ids == expected


def test_phi3_takes_the_space_after_its_tokens_along(tmp_path: Path) -> None:
    made = sentencepiece()
    for folder, architecture in (("phi3", "phi3"), ("llama", "llama")):
        (tmp_path / folder).mkdir()
        back = read_back(written(made), tmp_path / folder, architecture)
        same = back("a<|end|>\n  b").input_ids == back("a<|end|>b").input_ids
        assert same == (architecture == "phi3")


# What GGUF cannot hold.


def unigram() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.Unigram([("<|begin|>", 0.0), ("a", -1.0)], 0, byte_fallback=False))


def changed(part: str, value: Any, made: tokenizers.Tokenizer | None = None) -> tokenizers.Tokenizer:
    made = made or byte_level(gguf_words.RULES["gpt-2"])
    setattr(made, part, value)
    return made


TWO_FIRST = processors.TemplateProcessing(
    single="<|begin|> <|end|> $A", special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (unigram(), "it is of kind Unigram; byte-level and SentencePiece-like BPE are supported"),
        (tokenizers.Tokenizer(models.WordPiece({"<|begin|>": 0}, unk_token="<|begin|>")), "it is of kind WordPiece"),
        (changed("pre_tokenizer", pre_tokenizers.Whitespace()), "it cuts text into words by a rule that llama.cpp has"),
        (changed("pre_tokenizer", None), "it cuts text into words by a rule that llama.cpp has no name for"),
        (
            changed("normalizer", normalizers.Lowercase()),
            "it changes text by Lowercase first, which llama.cpp does not",
        ),
        (changed("post_processor", TWO_FIRST), "it puts more than one token before or after a text"),
        (sentencepiece(normalizers.NFKC()), "it prepares text by NFKC, which llama.cpp does not"),
        (sentencepiece(words=pre_tokenizers.Metaspace(split=True)), "it prepares text by Metaspace"),
    ],
    ids=["Unigram", "WordPiece", "words", "no words", "normalizer", "two first", "NFKC", "Metaspace"],
)
def test_a_tokenizer_that_gguf_cannot_hold_is_refused(made: tokenizers.Tokenizer, reason: str) -> None:
    with pytest.raises(HeadshareError, match=f"The tokenizer cannot be put into a GGUF file: {reason}"):
        written(made)


def test_a_refused_tokenizer_is_named(tmp_path: Path) -> None:
    wrapped(unigram()).save_pretrained(tmp_path)
    with pytest.raises(HeadshareError, match=f"The tokenizer of {tmp_path} cannot be put into a GGUF file: it is of"):
        gguf_vocabulary.metadata(tokenizer.load(tmp_path), CONFIG)


def test_a_vocabulary_larger_than_the_models_is_refused() -> None:
    with pytest.raises(HeadshareError, match="its vocabulary is larger than the model's of 100 tokens"):
        written(byte_level(gguf_words.RULES["gpt-2"]), replace(CONFIG, vocab_size=100))


# The tokens that end a turn.


@pytest.mark.parametrize(
    ("template", "ends"),
    [("{{ m }}<|im_end|>", (2,)), ("{{ m }}<|end|>{{ n }}<|im_end|>", (2, 1)), ("{{ m }}", ()), (None, ())],
)
def test_the_tokens_that_a_template_ends_turns_with(template: str | None, ends: tuple[int, ...]) -> None:
    tokens = {"tokenizer.ggml.tokens": ["a", "<|end|>", "<|im_end|>"]}
    assert gguf_tokenizer.turn_ends(tokens | {"tokenizer.chat_template": template}) == ends


def test_a_model_stops_at_every_token_that_ends_a_text_or_a_turn(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.tokens": [*(f"<{id}>" for id in range(hf_config().vocab_size - 1)), "<|end|>"],
        "tokenizer.chat_template": "{{ messages }}<|end|>",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.eom_token_id": 3,
    }
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(), metadata=metadata)
    assert hs.open_checkpoint(path).config.eos_token_ids == (2, 4, 3, hf_config().vocab_size - 1)


# Real files of models that chat as Qwen does, where they are named.


@pytest.mark.skipif("HEADSHARE_GGUF_FILES" not in os.environ, reason="no real GGUF files are named")
@pytest.mark.parametrize("path", os.environ.get("HEADSHARE_GGUF_FILES", "").split(os.pathsep))
def test_the_tokenizer_of_a_real_file_goes_out_and_back(path: str) -> None:
    metadata = read_header(Path(path)).metadata
    config = replace(CONFIG, vocab_size=len(metadata["tokenizer.ggml.tokens"]), eos_token_ids=())
    loaded = tokenizer.load(Path(path))
    again = gguf_vocabulary.metadata(loaded, config)
    assert again == {name: value for name, value in metadata.items() if name.startswith("tokenizer.")}
    text = loaded.decode(tokenizer.chat_message(loaded, "Hi"))
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert hs.open_checkpoint(path).config.eos_token_ids == (loaded.convert_tokens_to_ids("<|im_end|>"),)
