"""A tiny model with a tokenizer, as a folder that the command line can be pointed at."""

import json
from pathlib import Path
from typing import Any

import support
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import headshare_jax as hs

SPECIAL = ("<pad>", "<s>", "</s>")
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"

# Options of `share` where neither fit nor figures matter.
DIRECT = ("--method", "direct", "--no-eval")
ALPHABET = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]


def saved(folder: Path, **overrides: Any) -> Path:
    """Writes a tiny model, by transformers, and its tokenizer; returns the folder."""
    return with_tokenizer(support.saved_hf_model(folder, vocab_size=len(ALPHABET), **overrides))


def saved_without_torch(folder: Path, **overrides: Any) -> Path:
    """The same by the project's own export."""
    hs.save(support.tiny_model(vocab_size=len(ALPHABET), **overrides), folder, to="hf")
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    """Writes a byte-level tokenizer without merges beside a model; returns the folder."""
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
