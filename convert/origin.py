"""What an output may replace: what this program wrote, recognised by its content, and nothing that lies beside it."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from headshare_jax import parameters
from headshare_jax.convert import card, map_file, storage
from headshare_jax.convert.gguf_header import read_header
from headshare_jax.convert.native_document import TOKENIZER_FILES
from headshare_jax.errors import HeadshareError

_ARRAYS = "|".join([*parameters.PARAMETERS, *map(parameters.index_name, parameters.PROJECTIONS)])
# What lies in a model's folder: ours, a tokenizer's files, and what Orbax and TensorStore write.
_MODEL = re.compile(
    rf"README\.md|headshare\w*\.json|modeling_headshare\.py|(generation_)?config\.json"
    rf"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    rf"|{'|'.join(map(re.escape, TOKENIZER_FILES))}|additional_chat_templates/\w+\.jinja"
    rf"|vocab\.txt|spiece\.model|sentencepiece\.bpe\.model"
    rf"|weights/(_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|manifest\.ocdbt|(d/)?[0-9a-f]{{32}})"
    rf"|weights/({_ARRAYS})/(\.zarray|\.zattrs|zarr\.json|(c/)?\d+([./]\d+)*)"
)
_DEMO = re.compile(r"map\.(json|png)")
# Packed text in the cache.
_BLOCKS = re.compile(r"blocks\.(json|packed|int32)|(tokens|segments)\.npy")
# What a folder is that is only ever gone on with, by what lies in it.
_NEVER = {
    "a PostShare run": "checkpoints",
    "a sweep": "cache/identity.json",
    "journals of finished layers": "*/key.json",
}


def check(path: Path) -> None:
    """Raises HeadshareError, with what was found, unless a file or folder may be replaced: ours, or empty."""
    if path.is_dir():
        _check_folder(path)
        return
    what, is_ours = _FILES.get(path.suffix.lower(), ("an output", lambda file: False))
    if path.stat().st_size and not is_ours(path):
        raise HeadshareError(
            f"The file {path} is not replaced: it is not {what} that headshare wrote; choose another name."
        )


def _check_folder(path: Path) -> None:
    inside = sorted(_inside(path))
    if not inside or all(_BLOCKS.fullmatch(name) for name in inside):
        return
    models = [folder.name for folder in path.iterdir() if folder.is_dir() and _is_model(folder)]
    if _is_model(path):
        ours, foreign = "a model", [name for name in inside if not _MODEL.fullmatch(name)]
    elif models and _is_map(path / "map.json"):
        ours, foreign = "a demo's models", [name for name in inside if not _of_demo(name, models)]
    else:
        ours, foreign = next((what for what, name in _NEVER.items() if any(path.glob(name))), ""), inside
    if not foreign:
        return
    named = f"{', '.join(foreign[:2])}{f' and {len(foreign) - 2} more' if len(foreign) > 2 else ''}"
    if foreign != inside:
        what = f"beside {ours} it holds {named}, which headshare did not write; move that, or"
    elif ours:
        what = f"it holds {ours};"
    else:
        what = f"it holds {named}, and nothing tells that headshare wrote it;"
    raise HeadshareError(f"The folder {path} is not replaced: {what} choose another name.")


def _inside(folder: Path) -> Iterator[str]:
    """Every file, and every folder without any, by its path in the folder."""
    if storage.in_bucket(folder):
        yield from storage.files(folder)
        return
    for entry in folder.iterdir():
        inner = list(_inside(entry)) if entry.is_dir() and not entry.is_symlink() else []
        yield from (f"{entry.name}/{name}" for name in inner) if inner else [entry.name]


def _is_model(folder: Path) -> bool:
    return (
        _format(folder / "headshare.json") == "headshare-native"
        or _is_map(folder / map_file.NAME)
        or re.search(rb"\bwith headshare-jax \d", _bytes(folder / card.NAME)) is not None
    )


def _of_demo(name: str, models: list[str]) -> bool:
    folder, _, rest = name.partition("/")
    return bool(_MODEL.fullmatch(rest) if folder in models else _DEMO.fullmatch(name))


def _is_map(path: Path) -> bool:
    return _format(path) == "headshare-map"


def _is_scores(path: Path) -> bool:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {"donor_layer", "donor_unit", "value"} <= set(arrays)
    except (OSError, ValueError, TypeError, EOFError, BadZipFile):
        return False


def _is_gguf(path: Path) -> bool:
    try:
        return "headshare.version" in read_header(path).metadata
    except HeadshareError:
        return False


def _format(path: Path) -> Any:
    """What a JSON file says that it is."""
    try:
        document = json.loads(_bytes(path))
    except (ValueError, RecursionError):
        return None
    return document.get("format") if isinstance(document, dict) else None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError:
        return b""


# By ending: what a file must be, and whether it is. Pictures tell by their metadata.
_FILES: dict[str, tuple[str, Callable[[Path], bool]]] = {
    ".json": ("a sharing map", _is_map),
    ".npz": ("match scores", _is_scores),
    ".gguf": ("a model", _is_gguf),
    ".png": ("a picture", lambda path: b"Software\0headshare-jax" in _bytes(path)),
    ".svg": ("a picture", lambda path: b"<!-- headshare-jax -->" in _bytes(path)),
    ".pdf": ("a picture", lambda path: b"/Creator (headshare-jax)" in _bytes(path)),
}
