"""Tokenizers that travel with checkpoints."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from headshare_jax.errors import HeadshareError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def load(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder or GGUF file.

    Raises:
      HeadshareError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise HeadshareError(f"{path} carries no tokenizer; put its tokenizer.json (or tokenizer.model) there.")
    try:
        tokenizer: PreTrainedTokenizerBase = (
            AutoTokenizer.from_pretrained(path)
            if path.is_dir()
            else AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        )
    except Exception as error:  # transformers lets a damaged file show itself in any way
        raise HeadshareError(f"The tokenizer of {path} cannot be read: {error}") from error
    return tokenizer


def carry(source: Path, folder: Path) -> None:
    """Puts a checkpoint's tokenizer into another checkpoint's folder; a checkpoint without one is left without."""
    if source.is_dir():
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    else:
        load(source).save_pretrained(folder)
