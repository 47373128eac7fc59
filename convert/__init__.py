"""Reading and writing checkpoints: native, Hugging Face (plain and compact) and GGUF. Knows files, and no model.

Public: `open_checkpoint`, `save`, `locate`, `FORMATS`; `text.open_corpus` (texts), `journal_folder.JournalFolder`,
`map_file.read`, `tokenizer.load`. Names and layouts of tensors are in `keys`.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headshare_jax.convert import card, compact, gguf_file, huggingface, map_file, native, tokenizer
from headshare_jax.convert.atomic import new_directory
from headshare_jax.convert.tensor_files import TensorCheckpoint
from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.source import WeightSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FORMATS", "MAP_FILE", "locate", "open_checkpoint", "save"]

Checkpoint = TensorCheckpoint | native.NativeCheckpoint

FORMATS = ("native", "hf", "hf-compact")
MAP_FILE = map_file.NAME


def locate(src: str | Path) -> Path:
    """The local path of a checkpoint: the path itself, the only GGUF file in it, or a hub id's once it is fetched.

    Raises:
      HeadshareError: an empty name, or neither a path nor a hub id that can be fetched.
    """
    name = str(src)
    if not name.strip():
        raise HeadshareError("The name of the checkpoint is empty; give a folder, a .gguf file or a hub id.")
    at_hub = False
    with suppress(OSError, ValueError):  # of a name that no file can have
        if Path(name).exists():
            return _only_gguf(Path(name))
        at_hub = huggingface.is_hub_id(name) and not Path(name).parent.exists()
    if at_hub:
        return huggingface.fetch(name)
    raise HeadshareError(f"{name[:200]} does not exist; give a folder, a .gguf file or a hub id (owner/model).")


def _only_gguf(path: Path) -> Path:
    if not path.is_dir() or native.is_native(path) or (path / "config.json").is_file():
        return path
    files = list(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else path


def open_checkpoint(src: str | Path) -> Checkpoint:
    """Opens a checkpoint of any kind without reading its weights; every tensor's name, shape and type is checked.

    Args:
      src: native or Hugging Face folder, GGUF file, or hub id.

    Raises:
      HeadshareError: nothing there, an unsupported architecture, or a damaged checkpoint.

    Examples:
      >>> source = hs.open_checkpoint("my-llama")
      >>> source.read("k_pool_pdh", layer=0).shape
      (2, 64, 16)
    """
    path = locate(src)
    if path.is_file():
        return gguf_file.open_file(path)
    if native.is_native(path):
        return native.NativeCheckpoint(path)
    if compact.is_compact(path):
        return compact.open_directory(path)
    if (path / "config.json").is_file():
        return huggingface.open_directory(path)
    raise HeadshareError(
        f"{path} holds no checkpoint: no {native.DOCUMENT} (native), no config.json (Hugging Face), and "
        f"{'more than one' if any(path.glob('*.gguf')) else 'no'} .gguf file."
    )


def check_format(to: str) -> None:
    """Raises HeadshareError unless a format is one of `FORMATS`."""
    if to not in FORMATS:
        raise HeadshareError(f"The format {to!r} is not one of {', '.join(FORMATS)}.", option="to")


def save(
    source: WeightSource,
    dst: str | Path,
    *,
    to: str = "native",
    tokenizer_from: "str | Path | PreTrainedTokenizerBase | None" = None,
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
    documents: Mapping[str, str] | None = None,
) -> None:
    """Writes a model; the output appears complete or not at all.

    Args:
      source: a model, or an opened checkpoint, which is converted without ever being in memory as a whole.
      dst: folder to make.
      to: `native` (a shared model stays small), `hf` (plain `LlamaForCausalLM`, a shared model at its full size) or
        `hf-compact` (a shared model stays small, and runs so in PyTorch with `trust_remote_code=True`); the last two
        have its map and a model card beside it.
      tokenizer_from: tokenizer to carry along, or the name of the checkpoint that has it.
      overwrite: replace an existing output.
      provenance: plain data, such as the source's name, to keep in a native checkpoint's `headshare.json` or to tell in
        a model card.
      documents: texts to keep beside the weights, by file name.

    Raises:
      HeadshareError: unknown format, an output that exists, or one that cannot be written.

    Examples:
      >>> hs.save(shared, "my-llama-compact", to="hf-compact", tokenizer_from="my-llama")
    """
    check_format(to)
    if isinstance(tokenizer_from, (str, Path)):
        tokenizer_from = locate(tokenizer_from)
    beside = tokenizer_from if isinstance(tokenizer_from, Path) else None
    files = (getattr(source, "path", None), beside)
    with new_directory(Path(dst), overwrite=overwrite, keep=tuple(filter(None, files))) as folder:
        told = dict(provenance or {})
        if tokenizer_from is not None:
            tokenizer.carry(tokenizer_from, folder)
            license = None if beside is None else card.license_of(beside)
            told = told if license is None else {"license": license} | told
        if to == "native":
            native.write(source, folder, provenance=told)
        else:
            (huggingface if to == "hf" else compact).write(source, folder)
            if source.sharing is not None:
                (folder / MAP_FILE).write_text(source.sharing.to_json())
            (folder / card.NAME).write_text(card.card(source, to, Path(dst).name, told, list(documents or ())))
        for name, document in (documents or {}).items():
            (folder / name).write_text(document)
