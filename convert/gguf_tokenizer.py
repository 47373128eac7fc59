"""Tokenizers out of GGUF metadata, written as the `tokenizer.json` and `tokenizer_config.json` that others read."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from headshare_jax.convert.gguf_header import GgufHeader
from headshare_jax.errors import HeadshareError

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"

_GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_of_words])


# How each family cuts text into words before merging, by the name that llama.cpp gives it.
_WORDS: dict[str, pre_tokenizers.PreTokenizer] = {
    **dict.fromkeys(("default", "gpt-2"), _GPT2_WORDS),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "exaone"),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2_WORDS]),
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3"), _split_by(_LLAMA3_WORDS)),
    "tekken": _split_by(_TEKKEN_WORDS),
}
# These look a whole word up before they merge, and begin with the first token unless told otherwise.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3", "tekken")


def write(header: GgufHeader, folder: Path) -> None:
    """Writes a file's tokenizer into a folder, as `tokenizer.json` and `tokenizer_config.json`.

    Raises:
      HeadshareError: there is none, it is of an unsupported kind, or its lists contradict each other.
    """
    try:
        source = _Source(header.metadata)
        tokenizer = source.sentencepiece() if source.is_sentencepiece else source.byte_level()
        tokenizer.add_tokens(source.added())
        if source.adds_first:
            first = source.special["bos"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[first, "$A"], pair=[first, "$A", first, "$B:1"], special_tokens=[(first, source.ids[first])]
            )
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise HeadshareError(f"The tokenizer in {header.path} cannot be used: {error}.") from error
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(source.config(), indent=1) + "\n")


class _Source:
    """The tokenizer's part of the metadata."""

    def __init__(self, metadata: dict[str, Any]):
        self.metadata = metadata
        kind = self.get("model", None)
        if kind not in ("gpt2", "llama"):
            raise ValueError(f"it is of kind {kind!r}; gpt2 and llama are supported")
        self.is_sentencepiece = kind == "llama"
        self.tokens: list[str] = self.get("tokens", [])
        self.ids = {token: id for id, token in enumerate(self.tokens)}
        self.types: list[int] = self.get("token_type", [1] * len(self.tokens))
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        found = {name: self.get(f"{long}_token_id", -1) for name, long in names.items()}
        self.special = {name: self.tokens[id] for name, id in found.items() if 0 <= id < len(self.tokens)}
        self.words: str = self.get("pre", "default")
        self.adds_first = "bos" in self.special and self.get(
            "add_bos_token", self.is_sentencepiece or self.words in _WHOLE_WORDS
        )

    def get(self, name: str, default: Any) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def byte_level(self) -> Tokenizer:
        if self.words not in _WORDS:
            raise ValueError(f"it cuts words in the way named {self.words!r}, which is not supported")
        merges = [tuple(merge.split(" ")) for merge in self.get("merges", [])]
        tokenizer = Tokenizer(models.BPE(self.ids, merges, ignore_merges=self.words in _WHOLE_WORDS))
        tokenizer.pre_tokenizer = _WORDS[self.words]
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def sentencepiece(self) -> Tokenizer:
        tokenizer = Tokenizer(
            models.BPE(self.ids, self.merges(), unk_token=self.special.get("unk"), fuse_unk=True, byte_fallback=True)
        )
        prefix = self.get("add_space_prefix", True)
        spaces = normalizers.Replace(" ", _SPACE)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
        return tokenizer

    def merges(self) -> list[tuple[str, str]]:
        """SentencePiece joins the pair whose whole has the best score, however the whole is cut."""
        scored = zip(self.tokens, self.get("scores", []), self.types, strict=True)
        wholes = sorted(((-score, token) for token, score, kind in scored if kind == 1), key=lambda whole: whole[0])
        return [
            (token[:cut], token[cut:])
            for _, token in wholes
            for cut in range(1, len(token))
            if token[:cut] in self.ids and token[cut:] in self.ids
        ]

    def added(self) -> list[AddedToken]:
        """Tokens that are found in the text before it is cut into words."""
        return [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED) and token
        ]

    def config(self) -> dict[str, Any]:
        values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        values |= {f"{name}_token": token for name, token in self.special.items()}
        length, template = self.metadata.get("llama.context_length"), self.metadata.get("tokenizer.chat_template")
        values |= {"model_max_length": length} if length else {}
        return values | ({"chat_template": template} if template else {})
