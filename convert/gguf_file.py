"""GGUF files (llama.cpp), opened as checkpoints."""

from pathlib import Path

from headshare_jax.convert import gguf_heads, gguf_settings, keys
from headshare_jax.convert.gguf_header import read_header
from headshare_jax.convert.gguf_tensors import GgufReader
from headshare_jax.convert.tensor_files import TensorCheckpoint

_OPTIONAL = frozenset({gguf_settings.ROPE_TENSOR, gguf_settings.LONG_TENSOR, gguf_settings.SHORT_TENSOR})


def open_file(path: Path) -> TensorCheckpoint:
    """Opens a GGUF file of any architecture of `gguf_settings.ARCHITECTURES`.

    float32, float16 and bfloat16 tensors keep their type; quantised ones become float32, the type in which the `gguf`
    package dequantises them.

    Raises:
      HeadshareError: no GGUF file, truncated, another architecture, or tensors that do not fit its metadata.
    """
    header = read_header(path)
    reader, architecture = GgufReader(header), header.metadata.get("general.architecture")
    if architecture == "deci":
        heads = gguf_heads.read(header)
        config = gguf_settings.read(header, (heads.units * heads.group, heads.units))
        if heads.sharing is not None:
            heads.sharing.check_model(config)
            table = keys.GGUF["deci"]
            return gguf_heads.DeciCheckpoint(
                path, config, table, reader, _OPTIONAL, heads.sharing, kept_lu=heads.kept_lu, norms=heads.norms
            )
    else:
        config = gguf_settings.read(header)
    return TensorCheckpoint(path, config, keys.GGUF[str(architecture)], reader, _OPTIONAL)
