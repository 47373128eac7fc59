"""How a model is meant to be sampled: `generation_config.json`, and what GGUF has keys for.

The tokens that end a text, which that file names too, are read with the model's configuration.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.convert import huggingface
from headshare_jax.convert.gguf_header import GgufHeader, read_header
from headshare_jax.errors import HeadshareError

NAME = "generation_config.json"
_IN_GGUF = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
# transformers' own, where a file that asks for draws does not name one.
_TOP_K = 50


@dataclass(frozen=True)
class Defaults:
    """How a model is sampled unless something else is asked for.

    Attributes:
      temperature: 0 for the most likely token, as where the file does not ask for draws (`do_sample`).
      top_k: None for all tokens.
      top_p: 1 for all tokens.
      max_new_tokens: None where the file does not say.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    max_new_tokens: int | None = None


def read(path: Path) -> dict[str, Any]:
    """The fields of a checkpoint folder's file, none where there is no file; of a GGUF file what its keys say.

    Raises:
      HeadshareError: the file is not a JSON object.
    """
    if path.is_file():
        return _of_gguf(read_header(path))
    file = path / NAME
    return huggingface.read_json(file) if file.is_file() else {}


def _of_gguf(header: GgufHeader) -> dict[str, Any]:
    found = {name: header.metadata[key] for name, key in _IN_GGUF.items() if key in header.metadata}
    # The shortest decimal number that rounds to the float32 stored.
    fields = {
        name: float(str(np.float32(value))) if isinstance(value, float) else value for name, value in found.items()
    }
    return {"do_sample": True, **fields} if fields.get("temperature") else {}


def gguf_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What GGUF has keys for, by these keys; nothing where the file does not ask for draws."""
    if fields.get("do_sample") is not True:
        return {}
    values = {"temperature": 1.0} | {name: fields[name] for name in _IN_GGUF if _is_number(fields.get(name))}
    kinds = {name: int if name == "top_k" else float for name in values}
    return {_IN_GGUF[name]: kinds[name](value) for name, value in values.items()}


def defaults(path: Path) -> Defaults:
    """How a checkpoint's model is sampled, by its file or its GGUF keys.

    Raises:
      HeadshareError: a field that is not a number.
    """
    fields = read(path)

    def number(name: str, default: float | None, whole: bool) -> Any:
        value = fields.get(name, default)
        if value is None or (_is_number(value) and (type(value) is int or not whole)):
            return value
        kind = "a whole number" if whole else "a number"
        raise HeadshareError(f"{name} in {path / NAME if path.is_dir() else path} must be {kind}, not {value!r:.99}.")

    length = number("max_new_tokens", None, whole=True)
    temperature, top_p = (number(name, 1.0, whole=False) for name in ("temperature", "top_p"))
    top_k = number("top_k", _TOP_K, whole=True)
    if not fields.get("do_sample"):
        return Defaults(max_new_tokens=length)
    return Defaults(1.0 if temperature is None else temperature, top_k or None, top_p or 1.0, length)


def carry(fields: Mapping[str, Any], folder: Path, config: LlamaConfig) -> None:
    """Writes a folder's file: the fields of another checkpoint's, and the model's own special tokens."""
    own = config.to_hf()
    tokens = {name: own[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if own[name] is not None}
    (folder / NAME).write_text(json.dumps({**fields, **tokens}, indent=2) + "\n", encoding="utf-8")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
