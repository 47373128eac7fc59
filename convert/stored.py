"""How a checkpoint is stored, beyond what a `WeightSource` tells: its format, its types, and where it came from."""

import json
from math import prod
from typing import Any

from headshare_jax import parameters
from headshare_jax.convert.compact import CompactCheckpoint
from headshare_jax.convert.gguf_tensors import GgufReader
from headshare_jax.convert.native import NativeCheckpoint
from headshare_jax.convert.run_checkpoint import RunCheckpoint
from headshare_jax.convert.tensor_files import TensorCheckpoint
from headshare_jax.sharing.source import stored_shape

Stored = TensorCheckpoint | NativeCheckpoint | RunCheckpoint
_PROVENANCE = "headshare.provenance"


def format_of(source: Stored) -> str:
    """`native`, `hf-compact`, `hf`, `checkpoint of a run`, or for a GGUF file `gguf` with llama.cpp's architecture."""
    if isinstance(source, NativeCheckpoint):
        return "native"
    if isinstance(source, RunCheckpoint):
        return "checkpoint of a run"
    if isinstance(source.reader, GgufReader):
        return f"gguf ({source.reader.header.metadata.get('general.architecture')})"
    return "hf-compact" if isinstance(source, CompactCheckpoint) else "hf"


def types(source: Stored) -> dict[str, int]:
    """How many values are stored in each type, most first; of a GGUF file in its own types, such as `q4_1`."""
    counts: dict[str, int] = {}
    if isinstance(source, TensorCheckpoint) and isinstance(source.reader, GgufReader):
        for tensor in source.reader.header.tensors.values():
            name = tensor.kind.name.lower()
            counts[name] = counts.get(name, 0) + prod(tensor.shape)
    else:
        for parameter in parameters.parameter_names(source.config):
            name = str(source.dtype(parameter))
            counts[name] = counts.get(name, 0) + prod(stored_shape(source.config, parameter, source.sharing))
    names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return {names.get(name, name): count for name, count in ordered}


def provenance(source: Stored) -> dict[str, Any]:
    """What was kept with a checkpoint of where it came from; nothing in formats that have no place for it."""
    if isinstance(source, NativeCheckpoint | RunCheckpoint):
        return source.provenance
    if not isinstance(source.reader, GgufReader):
        return {}
    try:
        told = json.loads(source.reader.header.metadata.get(_PROVENANCE, "{}"))
    except (ValueError, TypeError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def has_checksums(source: Stored) -> bool:
    """Whether a checkpoint carries checksums of what it stores."""
    return isinstance(source, RunCheckpoint) or (isinstance(source, NativeCheckpoint) and source.checksums)
