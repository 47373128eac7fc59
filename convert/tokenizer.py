"""Tokenizers that travel with checkpoints."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from headshare_jax.convert import compact, confined, fetched, gguf_tokenizer, native, native_document, storage
from headshare_jax.convert.gguf_header import read_header
from headshare_jax.convert.native_document import TOKENIZER_FILES
from headshare_jax.convert.partial import temporary_folder
from headshare_jax.errors import HeadshareError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Classes that are no more than their tokenizer.json.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# No file of a tokenizer is larger; the largest known have 40 MB.
_MOST_BYTES = 2**27


def load(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder or GGUF file.

    Raises:
      HeadshareError: there is none, or it cannot be read.
    """
    if path.is_file():
        with temporary_folder() as folder:
            gguf_tokenizer.write(read_header(path), folder)
            return _load_folder(folder, folder)
    with storage.reached(path):
        native.check_files(path)
        with fetched.small_files(path) as folder:
            return _load_folder(path, folder)


def is_in(path: Path) -> bool:
    """Whether a folder has a tokenizer."""
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _load_folder(path: Path, files: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint; its files may lie in another folder."""
    if not is_in(files):
        raise HeadshareError(f"{path} carries no tokenizer; put its tokenizer.json (or tokenizer.model) there.")
    for name in TOKENIZER_FILES:
        if (files / name).is_file() and (files / name).stat().st_size > _MOST_BYTES:
            raise HeadshareError(f"{path / name} is larger than {_MOST_BYTES // 2**20} MiB, which is no tokenizer's.")
    if (files / "tokenizer.json").is_file():
        confined.ask(f"The tokenizer of {path}", "check_tokenizer", path=str((files / "tokenizer.json").resolve()))
    with _explained(f"The tokenizer of {path} cannot be read"):
        tokenizer = _read(files)
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise HeadshareError(
            f"model_max_length in the tokenizer_config.json of {path} must be a number, not "
            f"{tokenizer.model_max_length!r:.99}."
        )
    encode(tokenizer, "a")
    return tokenizer


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raises whatever goes wrong with a tokenizer as a HeadshareError; damage shows itself in any way."""
    try:
        yield
    except HeadshareError:
        raise
    except BaseException as error:
        # A panic of the tokenizers library is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:300].removesuffix(".") or type(error).__name__
        raise HeadshareError(f"{what}: {said}.") from error


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
        return str(native_document.read(path)["config"].get("family", "llama"))
    return compact.family(path)


def _class_name(path: Path) -> str | None:
    """The class that a folder's tokenizer_config.json names, if it can be read."""
    try:
        name = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def save(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Writes a tokenizer's files; whether it was loaded offline, which transformers would store, is no part of it."""
    if "local_files_only" in tokenizer.init_kwargs:
        tokenizer.init_kwargs["local_files_only"] = False
    with fetched.filled(folder) as files:
        tokenizer.save_pretrained(files)


def carry(source: "Path | PreTrainedTokenizerBase", folder: Path) -> None:
    """Puts a tokenizer, or that of a checkpoint, into another checkpoint's folder.

    A checkpoint without one is left without; so is a GGUF file with an unusable one, with a warning.
    """
    if not storage.is_name(source):
        save(source, folder)
        return
    if not source.is_file():
        native.check_files(source)
        with storage.reached(source):
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    (folder / name).write_bytes((source / name).read_bytes())
        return
    header = read_header(source)
    if "tokenizer.ggml.model" not in header.metadata:
        return
    try:
        with fetched.filled(folder) as files:
            gguf_tokenizer.write(header, files)
    except HeadshareError as error:
        logger.warning("%s The output is left without one.", error)


def encode(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text.

    Args:
      tokenizer: any.
      text: what to encode.
      special: with the tokens that the tokenizer puts before and after a text.

    Raises:
      HeadshareError: the tokenizer fails at it, or it is no Unicode text.
    """
    with _explained("The text cannot be tokenized"):
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    if max(ids, default=0) >= 2**31:
        raise HeadshareError(f"The tokenizer gives the token id {max(ids)}, which no vocabulary has.")
    return ids


def encode_each(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids of texts, without special tokens; raises HeadshareError as `encode`."""
    with _explained("The text cannot be tokenized"):
        ids: list[list[int]] = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        ).input_ids
    return ids


def decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """The text of token ids, without special tokens; raises HeadshareError where the tokenizer fails at it."""
    with _explained("The tokens cannot be decoded"):
        return str(tokenizer.decode(ids, skip_special_tokens=True))


def chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a chat in the tokenizer's template, up to where the answer begins.

    Args:
      tokenizer: one with a chat template.
      messages: with `role` (`system`, `user` or `assistant`) and `content` each.

    Raises:
      HeadshareError: the template fails, or takes more than `confined.MEMORY` or `confined.SECONDS`.
    """
    with _explained("The chat template of the tokenizer cannot be used"):
        template = tokenizer.get_chat_template()
        special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    text = confined.ask(
        "The chat template of the tokenizer", "render", template=template, messages=list(messages), special=special
    )
    return encode(tokenizer, text, special=False)


def chat_message(tokenizer: "PreTrainedTokenizerBase", message: str) -> list[int]:
    """Token ids of one user message in the tokenizer's chat template, up to where the answer begins."""
    return chat(tokenizer, [{"role": "user", "content": message}])
