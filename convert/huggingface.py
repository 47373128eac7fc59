"""Hugging Face checkpoints: directories and hub ids in, directories of the family's own class out."""

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headshare_jax import hf_class
from headshare_jax.config import LlamaConfig
from headshare_jax.convert import fetched, keys, storage
from headshare_jax.convert.fp8 import Fp8Reader
from headshare_jax.convert.hub import is_unreached
from headshare_jax.convert.safetensors_files import SafetensorsReader, write_safetensors
from headshare_jax.convert.tensor_files import TensorCheckpoint, TensorReader
from headshare_jax.convert.text_model import TextModelReader
from headshare_jax.convert.torch_files import TorchReader
from headshare_jax.convert.written import Written
from headshare_jax.errors import HeadshareError, TryAgain, explained
from headshare_jax.sharing.source import WeightSource

logger = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9


def open_directory(path: Path) -> TensorCheckpoint:
    """Opens a Hugging Face model directory (safetensors or .bin, sharded or not).

    Raises:
      HeadshareError: no configuration, no weights, or either of them unusable.
    """
    whole = read_json(path / "config.json")
    if (path / "quantize_config.json").is_file():
        # As AutoGPTQ wrote them.
        whole.setdefault("quantization_config", {"quant_method": "gptq"})
    fields = hf_class.text_model(whole)
    config, reader = with_stop_tokens(LlamaConfig.from_hf(fields), path), _reader(path, fields)
    if hf_class.is_multimodal(whole):
        logger.warning("Of the multimodal model in %s, the text model alone is read.", path)
        reader = TextModelReader(reader)
    return TensorCheckpoint(path, config, keys.of_class(hf_class.architecture(fields)), reader)


def with_stop_tokens(config: LlamaConfig, path: Path) -> LlamaConfig:
    """A configuration with the tokens that end a text by a folder's `generation_config.json`, if that names any.

    transformers' `generate` stops at those too, and chat models often name the end of a turn there alone.
    """
    file = path / "generation_config.json"
    stops = read_json(file).get("eos_token_id") if file.is_file() else None
    if stops is None:
        return config
    stops = stops if isinstance(stops, list) else [stops]
    if not all(type(token) is int for token in stops):
        raise HeadshareError(f"eos_token_id in {file} must be a token id or a list of them, not {stops!r:.99}.")
    return replace(config, eos_token_ids=tuple(stops))


def _reader(path: Path, fields: Mapping[str, Any]) -> TensorReader:
    files = weight_files(path, "model.safetensors")
    if files:
        return Fp8Reader(files, fields) if hf_class.is_fp8(fields) else SafetensorsReader(files)
    files = weight_files(path, "pytorch_model.bin")
    if files:
        return TorchReader([fetched.local(file) for file in files])
    raise HeadshareError(
        f"{path} has a config.json but no weights (model*.safetensors or pytorch_model*.bin); fetch them."
    )


def weight_files(path: Path, name: str) -> list[Path]:
    """The files that hold the weights: the one of this name, those of its index, or its shards."""
    if (path / name).is_file():
        return [path / name]
    index = path / f"{name}.index.json"
    if not index.is_file():
        stem, ending = name.split(".")
        return sorted(path.glob(f"{stem}-*-of-*.{ending}"))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise HeadshareError(f"{index} has no usable weight_map; fetch it again.")
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise HeadshareError(f"{index} names files outside its folder: {', '.join(outside)}.")
    there = {file.name for file in path.iterdir() if file.is_file()}
    missing = [file for file in files if file not in there]
    if missing:
        raise HeadshareError(f"{path} lacks shards that its index names: {', '.join(missing)[:999]}; fetch them.")
    return [path / file for file in files]


def read_json(path: Path, *, remedy: str = "fetch it again") -> dict[str, Any]:
    """A JSON object from a file; HeadshareError, with what to do with the file, if it is anything else."""
    try:
        with storage.reached(path):
            value = json.loads(path.read_text(encoding="utf-8"))
    except HeadshareError:
        raise
    except OSError as error:
        raise HeadshareError(explained(error)) from error
    except (ValueError, RecursionError) as error:
        raise HeadshareError(f"{path} is not readable JSON ({error}); {remedy}.") from error
    if not isinstance(value, dict):
        raise HeadshareError(f"{path} does not hold a JSON object; {remedy}.")
    return value


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/model`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def fetch(hub_id: str) -> Path:
    """Downloads a model from the Hugging Face hub into its cache: safetensors if it has them, else .bin.

    Without a network, what the cache holds is used.

    Raises:
      TryAgain: the hub was not reached.
      HeadshareError: it has no such model for this account.
    """
    from huggingface_hub import snapshot_download

    small = ["*.json", "tokenizer.model", "*.jinja", "merges.txt"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[*small, "model*.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*small, "pytorch_model*.bin"]))
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise (TryAgain if is_unreached(error) else HeadshareError)(
            f"{hub_id} is not a local path, and fetching it from the Hugging Face hub failed: {reason.rstrip('.')}; "
            "check the name and the network, or give a local folder or .gguf file."
        ) from error
    return folder


def write(
    source: WeightSource,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    notes: Written | None = None,
) -> None:
    """Writes a source into an existing folder as a plain, dense model of its family's class, such as
    `LlamaForCausalLM`; peak memory is one layer's tensor, or a piece of a table, and those that threads read ahead, and
    one parameter more each where tensors are fused.

    A shared model is expanded: every receiver gets its own copy of its donor's weights. A normalised output head
    (Baichuan-2) is written already normalised, since plain LLaMA has no such step.

    Args:
      source: the model.
      folder: an existing folder.
      shard_bytes: size beyond which a new file begins.
      notes: of what the folder holds already; none by default.
    """
    table = keys.of_family(source.config.family)
    tensors = keys.tensors(table, source.config)
    layout = {name: (tensor.shape, keys.dtype(source, tensor)) for name, tensor in tensors.items()}
    write_weights(folder, layout, lambda name: keys.reads(table, source, tensors[name]), shard_bytes, notes)
    write_settings(source, folder)


def write_weights(
    folder: Path,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
    reads: Callable[[str], keys.Reads],
    shard_bytes: int,
    notes: Written | None = None,
) -> None:
    """Writes `model.safetensors`, or shards with their index; peak memory is as of `pieces.write`.

    Args:
      folder: an existing folder.
      layout: shape and type of every tensor, by name.
      reads: what gives a tensor, by its name.
      shard_bytes: size beyond which a new shard begins.
      notes: as for `write`.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    shards = split_state_dict_into_shards_factory(
        dict(layout),
        get_storage_size=lambda tensor: math.prod(tensor[0]) * tensor[1].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in shards.filename_to_tensors.items():
        # Widest type first keeps every tensor at a multiple of its own width.
        ordered = sorted(names, key=lambda name: -layout[name][1].itemsize)
        write_safetensors(folder / file, {name: layout[name] for name in ordered}, reads, notes)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def write_settings(source: WeightSource, folder: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Writes `generation_config.json`, if none was carried along, and `config.json` as the last of a model's files.

    Extra fields go into the latter, or take the place of the family's.
    """
    fields = source.config.to_hf()
    tokens = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if not (folder / "generation_config.json").is_file():
        said = {name: value for name, value in tokens.items() if value is not None}
        _write_json(folder / "generation_config.json", said)
    _write_json(folder / "config.json", fields | {"dtype": str(source.dtype("embed_vd"))} | dict(extra or {}))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
