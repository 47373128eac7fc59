"""Tokenizers that travel with checkpoints."""

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from headshare_jax.convert import compact, gguf_tokenizer, huggingface, native
from headshare_jax.convert.gguf_header import read_header
from headshare_jax.errors import HeadshareError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Classes that are no more than their tokenizer.json.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
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
      HeadshareError: there is none, or it cannot be read.
    """
    if path.is_dir():
        return _load_folder(path)
    with tempfile.TemporaryDirectory() as folder:
        gguf_tokenizer.write(read_header(path), Path(folder))
        return _load_folder(Path(folder))


def is_in(path: Path) -> bool:
    """Whether a folder has a tokenizer."""
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _load_folder(path: Path) -> "PreTrainedTokenizerBase":
    if not is_in(path):
        raise HeadshareError(f"{path} carries no tokenizer; put its tokenizer.json (or tokenizer.model) there.")
    try:
        return _read(path)
    except Exception as error:  # transformers lets a damaged file show itself in any way
        raise HeadshareError(f"The tokenizer of {path} cannot be read: {error}") from error


def _read(path: Path) -> "PreTrainedTokenizerBase":
    tokenizer: PreTrainedTokenizerBase
    if (path / "tokenizer.json").is_file() and _class_name(path) in _PLAIN_CLASSES:
        # What AutoTokenizer would choose; asking it imports PyTorch where there is one, which takes seconds.
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        return tokenizer
    from transformers import AutoConfig, AutoTokenizer

    family = _family(path)
    config = None if family is None else AutoConfig.for_model(family)
    tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
    return tokenizer


def _family(path: Path) -> str | None:
    """The family of a checkpoint whose own configuration transformers does not know; it has a say in the class."""
    if native.is_native(path):
        return str(huggingface.read_json(path / native.DOCUMENT)["config"].get("family", "llama"))
    return compact.family(path)


def _class_name(path: Path) -> str | None:
    """The class that a folder's tokenizer_config.json names, if it can be read."""
    try:
        name = json.loads((path / "tokenizer_config.json").read_text()).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def save(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Writes a tokenizer's files; whether it was loaded offline, which transformers would store, is no part of it."""
    if "local_files_only" in tokenizer.init_kwargs:
        tokenizer.init_kwargs["local_files_only"] = False
    tokenizer.save_pretrained(folder)


def carry(source: "Path | PreTrainedTokenizerBase", folder: Path) -> None:
    """Puts a tokenizer, or that of a checkpoint, into another checkpoint's folder.

    A checkpoint without one is left without; so is a GGUF file with an unusable one, with a warning.
    """
    if not isinstance(source, Path):
        save(source, folder)
        return
    if source.is_dir():
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    header = read_header(source)
    if "tokenizer.ggml.model" not in header.metadata:
        return
    try:
        gguf_tokenizer.write(header, folder)
    except HeadshareError as error:
        logger.warning("%s The output is left without one.", error)


def chat_message(tokenizer: "PreTrainedTokenizerBase", message: str) -> list[int]:
    """Token ids of one user message in the tokenizer's chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)
