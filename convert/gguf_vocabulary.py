"""Tokenizers as the metadata of GGUF files: byte-level BPE, and BPE after SentencePiece's manner."""

import json
import re
from typing import TYPE_CHECKING, Any

from headshare_jax.config import LlamaConfig
from headshare_jax.convert import gguf_words
from headshare_jax.errors import HeadshareError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0


def metadata(tokenizer: "PreTrainedTokenizerBase", config: LlamaConfig) -> dict[str, Any]:
    """The `tokenizer.` entries of a GGUF file: text, numbers, booleans and lists of these, by key.

    Args:
      tokenizer: a tokenizer of the tokenizers library.
      config: the model's. It gives the size of the vocabulary, which is filled up with unused tokens, and the special
        tokens that the tokenizer does not name; all its end-of-sequence tokens are kept.

    Raises:
      HeadshareError: GGUF cannot hold such a tokenizer, or it has more tokens than the model.
    """
    try:
        source = _Source(tokenizer, config)
        entries = source.sentencepiece() if source.is_sentencepiece else source.byte_level()
        entries |= source.special()
    except ValueError as error:
        name = f" of {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
        raise HeadshareError(
            f"The tokenizer{name} cannot be put into a GGUF file: {error}. Write another format, or give a tokenizer "
            "that llama.cpp knows."
        ) from error
    return {f"tokenizer.ggml.{name}": value for name, value in entries.items()} | _templates(tokenizer)


class _Source:
    """A tokenizer's parts, as `tokenizer.json` has them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: LlamaConfig):
        if not tokenizer.is_fast:
            raise ValueError("it has no tokenizer.json")
        self.tokenizer, self.config = tokenizer, config
        self.parts = json.loads(tokenizer.backend_tokenizer.to_str())
        self.model = self.parts["model"]
        if self.model["type"] != "BPE" or self.model["continuing_subword_prefix"] or self.model["end_of_word_suffix"]:
            raise ValueError(f"it is of kind {self.model['type']}; byte-level and SentencePiece-like BPE are supported")
        self.is_sentencepiece = self.model["byte_fallback"]
        self.merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in self.model["merges"]]
        self.added = {token["content"]: token["special"] for token in self.parts["added_tokens"]}
        self.tokens, self.kinds = self.vocabulary()

    def vocabulary(self) -> tuple[list[str], list[int]]:
        """Every token and its kind; ids that no token has are named as llama.cpp's converter names them."""
        size = self.config.vocab_size
        tokens, kinds = [f"[PAD{id}]" for id in range(size)], [UNUSED] * size
        ids = self.model["vocab"] | {token["content"]: token["id"] for token in self.parts["added_tokens"]}
        for token, id in ids.items():
            if token == f"[PAD{id}]":
                continue
            if id < size:
                kinds[id] = self.kind(token)
                # These are looked for in the text as it was written.
                tokens[id] = token.replace(SPACE, " ") if kinds[id] == USER_DEFINED else token
            elif token not in self.added:
                raise ValueError(f"its vocabulary is larger than the model's of {size} tokens")
        return tokens, kinds

    def kind(self, token: str) -> int:
        if self.is_sentencepiece and token == self.model["unk_token"]:
            return UNKNOWN
        if token in self.added:
            # As llama.cpp's converter has it: some tokenizers do not call their control tokens special.
            return CONTROL if self.added[token] or re.fullmatch("<[|\uff5c].*[|\uff5c]>", token) else USER_DEFINED
        return BYTE if self.is_sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL

    def byte_level(self) -> dict[str, Any]:
        for step in _steps(self.parts["normalizer"]):
            if step["type"] != "NFC":  # which llama.cpp leaves to whoever writes the text
                raise ValueError(f"it changes text by {step['type']} first, which llama.cpp does not")
        words = gguf_words.name_of(self.parts["pre_tokenizer"] or {}, self.model["ignore_merges"])
        if words is None:
            raise ValueError("it cuts text into words by a rule that llama.cpp has no name for")
        prefix = self.tokenizer.init_kwargs.get("add_prefix_space")
        return {
            "model": "gpt2",
            "pre": words,
            "tokens": self.tokens,
            "token_type": self.kinds,
            "merges": [" ".join(pair) for pair in self.merges],
        } | ({} if prefix is None else {"add_space_prefix": prefix})

    def sentencepiece(self) -> dict[str, Any]:
        prefix = False
        for step in _steps(self.parts["normalizer"]) + _steps(self.parts["pre_tokenizer"]):
            match step:
                case {"type": "Prepend", "prepend": "\u2581"}:
                    prefix = True
                case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                    pass
                case {"type": "Metaspace", "replacement": "\u2581", "split": False, "prepend_scheme": scheme}:
                    prefix = scheme != "never"
                case _:
                    raise ValueError(f"it prepares text by {step['type']}, which llama.cpp does not")
        return {
            "model": "llama",
            "pre": "default",
            "tokens": self.tokens,
            "token_type": self.kinds,
            "scores": self.scores(),
            "add_space_prefix": prefix,
        }

    def scores(self) -> list[float]:
        """SentencePiece's scores: the earlier a piece is made, the better; letters come after all that is made."""
        normal = [token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind == NORMAL]
        pieces = dict.fromkeys(["".join(pair) for pair in self.merges] + normal)
        score = {piece: -float(rank) for rank, piece in enumerate(pieces)}
        others = {BYTE: 0.0, UNUSED: _UNUSED_SCORE}
        return [
            score[token] if kind == NORMAL else others.get(kind, _ADDED_SCORE)
            for token, kind in zip(self.tokens, self.kinds, strict=True)
        ]

    def special(self) -> dict[str, Any]:
        config, tokenizer = self.config, self.tokenizer
        eos = config.eos_token_ids[0] if config.eos_token_ids else None
        beside = {"bos": config.bos_token_id, "eos": eos, "unk": None, "pad": config.pad_token_id}
        ids = {}
        for short, name in SPECIAL.items():
            id = getattr(tokenizer, f"{short}_token_id")
            id = beside[short] if id is None else id
            if id is not None and 0 <= id < config.vocab_size:
                ids[name] = id
        first, last = self.around()
        # llama.cpp begins and ends texts with these two only.
        ids |= ({"bos": first} if first is not None else {}) | ({"eos": last} if last is not None else {})
        more = [id for id in config.eos_token_ids if id >= 0 and id != ids.get("eos")]
        ids |= dict(zip(("eot", "eom"), more, strict=False))
        adds = {"add_bos_token": first is not None} | ({"add_eos_token": True} if last is not None else {})
        return {f"{name}_token_id": id for name, id in ids.items()} | adds

    def around(self) -> tuple[int | None, int | None]:
        """The tokens that the tokenizer puts before and after a text."""
        plain, whole = (self.tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
        for before in range(len(whole) - len(plain) + 1):
            first, last = whole[:before], whole[before + len(plain) :]
            if [*first, *plain, *last] == whole and len(first) < 2 and len(last) < 2:
                return (first or [None])[0], (last or [None])[0]
        raise ValueError("it puts more than one token before or after a text")


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part.get("normalizers", []) + part.get("pretokenizers", []) for step in _steps(inner)]


def _templates(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    template = tokenizer.chat_template
    named = template if isinstance(template, dict) else {"default": template} if template else {}
    others = [name for name in named if name != "default"]
    return {
        f"tokenizer.chat_template{'' if name == 'default' else f'.{name}'}": text for name, text in named.items()
    } | ({"tokenizer.chat_templates": others} if others else {})
