"""Hugging Face checkpoints: directories and hub ids in, plain `LlamaForCausalLM` directories out."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from headshare_jax.config import LlamaConfig
from headshare_jax.convert import keys
from headshare_jax.convert.tensor_files import SafetensorsReader, TensorCheckpoint, TensorReader
from headshare_jax.convert.torch_files import TorchReader
from headshare_jax.errors import HeadshareError
from headshare_jax.modeling import normalized_rows
from headshare_jax.parameters import WeightSource

SHARD_BYTES = 5 * 10**9
_TABLES = {"LlamaForCausalLM": keys.LLAMA, "BaichuanForCausalLM": keys.BAICHUAN}


def open_directory(path: Path) -> TensorCheckpoint:
    """Opens a Hugging Face model directory (safetensors or .bin, sharded or not).

    Raises:
      HeadshareError: no configuration, no weights, or either of them unusable.
    """
    fields = read_json(path / "config.json")
    config = LlamaConfig.from_hf(fields)
    architectures = fields.get("architectures") or ["LlamaForCausalLM"]
    table = next(_TABLES[name] for name in architectures if name in _TABLES)
    return TensorCheckpoint(path, config, table, _reader(path))


def _reader(path: Path) -> TensorReader:
    for pattern, reader in (("model*.safetensors", SafetensorsReader), ("pytorch_model*.bin", TorchReader)):
        files = _weight_files(path, pattern)
        if files:
            return reader(files)
    raise HeadshareError(f"{path} has a config.json but no weights (model*.safetensors or pytorch_model*.bin).")


def _weight_files(path: Path, pattern: str) -> list[Path]:
    index = path / f"{pattern.replace('*', '')}.index.json"
    if not index.is_file():
        return sorted(path.glob(pattern))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise HeadshareError(f"{index} has no usable weight_map.")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise HeadshareError(f"{index} names files outside its folder: {', '.join(outside)}.")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise HeadshareError(f"{path} lacks shards that its index names: {', '.join(missing)}; fetch them.")
    return [path / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; HeadshareError if it is anything else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HeadshareError(f"{path} is not readable JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise HeadshareError(f"{path} does not hold a JSON object.")
    return value


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/model`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def fetch(hub_id: str) -> Path:
    """Downloads a model from the Hugging Face hub into its cache: safetensors if it has them, else .bin.

    Raises:
      HeadshareError: the hub cannot be reached, or has no such model for this account.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    small = ["*.json", "tokenizer.model", "*.jinja", "merges.txt"]
    try:
        files = HfApi().list_repo_files(hub_id)
        weights = "model*.safetensors" if any(name.endswith(".safetensors") for name in files) else "pytorch_model*.bin"
        return Path(snapshot_download(hub_id, allow_patterns=[*small, weights]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HeadshareError(
            f"{hub_id} is not a local path, and fetching it from the Hugging Face hub failed: {reason}"
        ) from error


def write(source: WeightSource, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a source into an existing folder as a plain, dense `LlamaForCausalLM`; peak memory is one shard.

    A shared model is expanded: every receiver gets its own copy of its donor's weights. A normalised output head
    (Baichuan-2) is written already normalised, since plain LLaMA has no such step.
    """
    tensors = keys.tensors(keys.LLAMA, source.config)
    sizes = {
        name: int(np.prod(tensor.shape)) * source.dtype(tensor.parts[0]).itemsize for name, tensor in tensors.items()
    }
    shards = _plan_shards(sizes, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        try:
            save_file({name: _encoded(source, tensors[name]) for name in names}, folder / file, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file} could not be stored ({error})") from error
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    fields = source.config.to_hf()
    _write_json(folder / "config.json", fields | {"dtype": str(source.dtype("embed_vd"))})
    special = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if fields[name] is not None}
    _write_json(folder / "generation_config.json", special)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _plan_shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each shard, in order; a tensor larger than a shard has one to itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _encoded(source: WeightSource, tensor: keys.Tensor) -> np.ndarray:
    (name,) = tensor.parts
    value = source.read(name, tensor.layer)
    if name == "head_vd" and source.config.normalize_head:
        value = np.asarray(normalized_rows(jnp.asarray(value)))
    return np.ascontiguousarray(keys.encode(keys.LLAMA, source.config, name, value))
