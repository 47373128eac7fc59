"""Reading and writing checkpoints: Hugging Face, GGUF and native."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from headshare_jax import parameters
from headshare_jax.convert import gguf_file, huggingface, native, tokenizer
from headshare_jax.convert.atomic import new_directory
from headshare_jax.convert.tensor_files import TensorCheckpoint
from headshare_jax.errors import HeadshareError
from headshare_jax.modeling import Llama
from headshare_jax.parameters import WeightSource

__all__ = ["MAP_FILE", "load", "locate", "open_checkpoint", "save"]

Checkpoint = TensorCheckpoint | native.NativeCheckpoint

MAP_FILE = "headshare_map.json"


def locate(src: str | Path) -> Path:
    """The local path of a checkpoint: the path itself, or that of a hub id once it is fetched.

    Raises:
      HeadshareError: an empty name, or neither a path nor a hub id that can be fetched.
    """
    name = str(src)
    if not name.strip():
        raise HeadshareError("The name of the checkpoint is empty; give a folder, a .gguf file or a hub id.")
    with suppress(OSError, ValueError):  # of a name that no file can have
        if Path(name).exists():
            return Path(name)
        if huggingface.is_hub_id(name) and not Path(name).parent.exists():
            return huggingface.fetch(name)
    raise HeadshareError(f"{name[:200]} does not exist; give a folder, a .gguf file or a hub id (owner/model).")


def open_checkpoint(src: str | Path) -> Checkpoint:
    """Opens a checkpoint of any kind without reading its weights; every tensor's name, shape and type is checked.

    Args:
      src: native or Hugging Face folder, GGUF file, or hub id.

    Raises:
      HeadshareError: nothing there, an unsupported architecture, or a damaged checkpoint.
    """
    path = locate(src)
    if path.is_file():
        return gguf_file.open_file(path)
    if native.is_native(path):
        return native.NativeCheckpoint(path)
    if (path / "config.json").is_file():
        return huggingface.open_directory(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return gguf_file.open_file(files[0])
    raise HeadshareError(
        f"{path} holds no checkpoint: no {native.DOCUMENT} (native), no config.json (Hugging Face), and "
        f"{'more than one' if files else 'no'} .gguf file."
    )


def load(
    src: str | Path | WeightSource, *, dtype: str | None = None, compute_dtype: str = "float32", remat: str = "none"
) -> Llama:
    """Loads a model; peak memory is its own size plus one parameter.

    Args:
      src: native or Hugging Face folder, GGUF file, hub id, or an opened checkpoint.
      dtype: type to store parameters in (`float32`, `bfloat16`, `float16`); by default the checkpoint's own.
      compute_dtype: `float32` or `bfloat16`.
      remat: as in `Llama`.

    Raises:
      HeadshareError: as `open_checkpoint`.
    """
    source = open_checkpoint(src) if isinstance(src, (str, Path)) else src
    names = parameters.parameter_names(source.config)
    params = {name: jnp.asarray(parameters.assemble(source, name), dtype) for name in names}
    return Llama(source.config, params, sharing=source.sharing, compute_dtype=compute_dtype, remat=remat)


def save(
    source: WeightSource,
    dst: str | Path,
    *,
    to: str = "native",
    tokenizer_from: Path | None = None,
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Writes a model; the output appears complete or not at all.

    Args:
      source: a model, or an opened checkpoint, which is converted without ever being in memory as a whole.
      dst: folder to make.
      to: `native` (a shared model stays small) or `hf` (plain `LlamaForCausalLM`, a shared model at its full size,
        with its map beside it).
      tokenizer_from: checkpoint whose tokenizer to carry along.
      overwrite: replace an existing output.
      provenance: plain data to keep in a native checkpoint's `headshare.json`.

    Raises:
      HeadshareError: unknown format, an output that exists, or one that cannot be written.
    """
    if to not in ("native", "hf"):
        raise HeadshareError(f"The format {to!r} is not one of native, hf.")
    files = (getattr(source, "path", None), tokenizer_from)
    with new_directory(Path(dst), overwrite=overwrite, keep=tuple(filter(None, files))) as folder:
        if tokenizer_from is not None:
            tokenizer.carry(tokenizer_from, folder)
        if to == "native":
            native.write(source, folder, provenance=provenance)
        else:
            huggingface.write(source, folder)
            if source.sharing is not None:
                (folder / MAP_FILE).write_text(source.sharing.to_json())
