"""`headshare.json` of a native checkpoint: its versions, its own checksum, and the files that it answers for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from pydantic import BaseModel

from headshare_jax.convert import storage
from headshare_jax.errors import HeadshareError, one_sentence

DOCUMENT, WEIGHTS = "headshare.json", "weights"
FORMAT, VERSION = "headshare-native", 2
# Where it keeps the checksums of an array's chunks.
SUMS = "xxh3_64_of_chunks"
# What readers look for beside the weights.
TOKENIZER_FILES = (
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
_BESIDE = {*TOKENIZER_FILES, "generation_config.json"}
# Of what is damaged, no more are named.
MOST_NAMED = 10
_CHECKSUM = b'"checksum": '


class _File(BaseModel):
    bytes: int
    xxh3_64: str | None = None


class _Document(BaseModel):
    """Whoever can seal a document could seal any; the configuration and the map have checks of their own."""

    config: dict[str, Any]
    sharing: dict[str, Any] | None
    provenance: dict[str, Any]
    files: dict[str, _File]
    xxh3_64_of_chunks: dict[str, str]


def checksum(values: np.ndarray | bytes) -> str:
    """xxh3-64 of a contiguous array's bytes, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(values if isinstance(values, bytes) else values.view(np.uint8).data)


def named(problems: list[str]) -> str:
    """Problems in one sentence, without its end."""
    left = len(problems) - MOST_NAMED
    return "; ".join(problems[:MOST_NAMED]) + (f"; and {left} more" if left > 0 else "")


def write(folder: Path, document: dict[str, Any]) -> None:
    """Writes a checkpoint's document; all files that it answers for must lie in the folder."""
    kept = {"format": FORMAT, "version": VERSION, **document, "files": dict(_described(folder))}
    head = json.dumps(kept, indent=1).encode().removesuffix(b"\n}") + b",\n " + _CHECKSUM
    (folder / DOCUMENT).write_bytes(head + _end(head))


def _end(head: bytes) -> bytes:
    return f'"{checksum(head)}"\n}}\n'.encode()


def _described(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every file's size, and its checksum unless it holds values, whose chunks have one each."""
    for name, size in storage.files(folder).items():
        said: dict[str, Any] = {"bytes": size}
        yield name, said if _holds_values(name) else said | {"xxh3_64": checksum((folder / name).read_bytes())}


def _holds_values(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == WEIGHTS and parts[2:3] == ["c"]


def read(folder: Path) -> dict[str, Any]:
    """A checkpoint's document, of this version or an older one, which has no checksums.

    Raises:
      HeadshareError: it is unreadable, of another format or version, edited or damaged.
    """
    path = folder / DOCUMENT
    try:
        content = path.read_bytes()
        document = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise HeadshareError(f"{path} is not readable JSON ({error}); copy it again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise HeadshareError(f'{path} is not a {FORMAT} document (its "format" says otherwise).')
    version = document.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise HeadshareError(f"{path} has version {version!r:.99}; this release reads versions 1 to {VERSION}.")
    if version == 1:
        return document
    head, key, end = content.rpartition(_CHECKSUM)
    if end != _end(head + key):
        raise HeadshareError(
            f"{path} is damaged or was edited (its checksum differs); copy or make the checkpoint again. A map is "
            "edited in a file of its own, and applied to the dense model by share."
        )
    with one_sentence(str(path)):
        _Document.model_validate(document, strict=True)
    return document


def has_checksums(document: dict[str, Any]) -> bool:
    return document["version"] > 1


def damaged_files(folder: Path, document: dict[str, Any]) -> Iterator[str]:
    """Every file that is missing, one too many, or not as it was written; the values of arrays are not read."""
    files: dict[str, dict[str, Any]] = document["files"]
    there = storage.files(folder)
    # A checkpoint that was written without a tokenizer may be given one.
    known = _BESIDE if _BESIDE.intersection(files) else set()
    found = {name for name in there if name.startswith(f"{WEIGHTS}/") or name in known}
    yield from (f"{name} is one file too many" for name in sorted(found - set(files)))
    for name, said in files.items():
        if name not in there:
            yield f"{name} is missing"
        elif there[name] != said["bytes"]:
            yield f"{name} has {there[name]:,} bytes instead of {said['bytes']:,}"
        elif "xxh3_64" in said and checksum((folder / name).read_bytes()) != said["xxh3_64"]:
            yield f"{name} is damaged or was edited (its checksum differs)"


def check_files(folder: Path, document: dict[str, Any]) -> None:
    """Raises HeadshareError that names what `damaged_files` finds, if the document has checksums."""
    if has_checksums(document) and (problems := list(damaged_files(folder, document))):
        raise HeadshareError(f"{folder} is damaged: {named(problems)}; copy or make it again.")
