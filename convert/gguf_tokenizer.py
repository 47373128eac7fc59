"""Tokenizers out of GGUF metadata, written as the `tokenizer.json` and `tokenizer_config.json` that others read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from headshare_jax.convert import gguf_words
from headshare_jax.convert.gguf_header import GgufHeader
from headshare_jax.convert.gguf_vocabulary import CONTROL, NORMAL, SPACE, SPECIAL, UNUSED, USER_DEFINED
from headshare_jax.errors import HeadshareError

# Where a file does not name the token that ends a turn, it is the one of these that its chat template writes.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")


def write(header: GgufHeader, folder: Path) -> None:
    """Writes a file's tokenizer into a folder, as `tokenizer.json` and `tokenizer_config.json`.

    Raises:
      HeadshareError: there is none, it is of an unsupported kind, or its lists contradict each other.
    """
    try:
        source = _Source(header.metadata)
        tokenizer = source.sentencepiece() if source.is_sentencepiece else source.byte_level()
        tokenizer.add_tokens(source.added())
        tokenizer.post_processor = source.around()
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise HeadshareError(f"The tokenizer in {header.path} cannot be used: {error}.") from error
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(source.config(), indent=1) + "\n", encoding="utf-8")


def turn_ends(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that the chat template ends turns with, known by their text, as llama.cpp knows them."""
    template, tokens = metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(template, str) or not isinstance(tokens, list):
        return ()
    return tuple(tokens.index(token) for token in _TURN_ENDS if token in template and token in tokens)


class _Source:
    """The tokenizer's part of the metadata."""

    def __init__(self, metadata: dict[str, Any]):
        self.metadata = metadata
        kind = self.get("model", None)
        if kind not in ("gpt2", "llama"):
            raise ValueError(f"it is of kind {kind!r}; gpt2 and llama are supported")
        self.is_sentencepiece = kind == "llama"
        self.tokens: list[str] = self.get("tokens", [])
        self.types: list[int] = self.get("token_type", [NORMAL] * len(self.tokens))
        used = len(self.tokens)
        while used and self.types[used - 1] == UNUSED and self.tokens[used - 1] == f"[PAD{used - 1}]":
            used -= 1  # names for rows of the model that no token has
        self.ids = {token: id for id, token in enumerate(self.tokens[:used])}
        found = {short: self.get(f"{name}_token_id", -1) for short, name in SPECIAL.items()}
        self.special = {short: self.tokens[id] for short, id in found.items() if 0 <= id < len(self.tokens)}
        self.words: str = self.get("pre", "default")

    def get(self, name: str, default: Any) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def byte_level(self) -> Tokenizer:
        if self.words not in gguf_words.RULES:
            raise ValueError(f"it cuts words in the way named {self.words!r}, which is not supported")
        merges = [tuple(merge.split(" ")) for merge in self.get("merges", [])]
        tokenizer = Tokenizer(models.BPE(self.ids, merges, ignore_merges=self.words in gguf_words.WHOLE_WORDS))
        tokenizer.pre_tokenizer = gguf_words.RULES[self.words]
        if self.words in gguf_words.COMPOSED:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def sentencepiece(self) -> Tokenizer:
        tokenizer = Tokenizer(
            models.BPE(self.ids, self.merges(), unk_token=self.special.get("unk"), fuse_unk=True, byte_fallback=True)
        )
        prefix = self.get("add_space_prefix", True)
        spaces = normalizers.Replace(" ", SPACE)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
        return tokenizer

    def merges(self) -> list[tuple[str, str]]:
        """SentencePiece joins the pair whose whole has the best score, however the whole is cut."""
        scored = zip(self.tokens, self.get("scores", []), self.types, strict=True)
        wholes = sorted(
            ((-score, token) for token, score, kind in scored if kind == NORMAL), key=lambda whole: whole[0]
        )
        return [
            (token[:cut], token[cut:])
            for _, token in wholes
            for cut in range(1, len(token))
            if token[:cut] in self.ids and token[cut:] in self.ids
        ]

    def added(self) -> list[AddedToken]:
        """Tokens that are found in the text before it is cut into words."""
        # Phi-3's take the white space after them along, which GGUF has no field for; llama.cpp does it too.
        phi3 = self.is_sentencepiece and self.metadata.get("general.architecture") == "phi3"
        return [
            AddedToken(
                token,
                special=kind == CONTROL,
                normalized=False,
                rstrip=phi3 and token not in ("<s>", "<|endoftext|>"),
            )
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (CONTROL, USER_DEFINED) and token
        ]

    def around(self) -> processors.PostProcessor | None:
        """What puts the first token before a text, and the last after it."""
        whole_words = self.words in gguf_words.WHOLE_WORDS
        adds = {
            "bos": self.get("add_bos_token", self.is_sentencepiece or whole_words),
            "eos": self.get("add_eos_token", False),
        }
        first, last = ([self.special[name]] if adds[name] and name in self.special else [] for name in adds)
        if not first + last:
            return None
        return processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B:1", *last],
            special_tokens=[(token, self.ids[token]) for token in dict.fromkeys(first + last)],
        )

    def config(self) -> dict[str, Any]:
        values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        values |= {f"{name}_token": token for name, token in self.special.items()}
        length = self.metadata.get(f"{self.metadata.get('general.architecture')}.context_length")
        prefix = self.get("add_space_prefix", None)
        values |= {"model_max_length": length} if length else {}
        values |= {} if prefix is None else {"add_prefix_space": prefix}
        template = self.metadata.get("tokenizer.chat_template")
        named = {
            name: self.metadata[f"tokenizer.chat_template.{name}"]
            for name in self.metadata.get("tokenizer.chat_templates", [])
        }
        if named:
            named = ({"default": template} if template else {}) | named
            template = [{"name": name, "template": text} for name, text in named.items()]
        return values | ({"chat_template": template} if template else {})
