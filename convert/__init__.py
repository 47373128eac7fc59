"""Reading and writing checkpoints: native, Hugging Face (plain and compact) and GGUF. Knows files, and no model.

Public: `open_checkpoint`, `save`, `verify`, `locate`, and what `outputs` has; `text.open_corpus` (texts),
`journal_folder.JournalFolder`, `map_file.read`, `tokenizer.load`. Names and layouts of tensors are in `keys`.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headshare_jax.convert import (
    atomic,
    card,
    compact,
    fetched,
    generation_config,
    gguf_file,
    gguf_writer,
    huggingface,
    integrity,
    map_file,
    native,
    native_document,
    native_writer,
    run_checkpoint,
    storage,
    tokenizer,
    written,
)
from headshare_jax.convert.outputs import (
    FORMATS,
    check_output,
    check_room,
    output_dtype,
    paths,
    quantised_as,
)
from headshare_jax.convert.partial import recover
from headshare_jax.convert.tensor_files import TensorCheckpoint
from headshare_jax.convert.written import Written
from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import WatchedView
from headshare_jax.typed import typed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FORMATS", "MAP_FILE", "check_output", "check_room", "locate", "open_checkpoint", "output_dtype",
    "quantised_as", "save", "tokenizer_place", "verify",
]  # fmt: skip

Checkpoint = TensorCheckpoint | native.NativeCheckpoint | run_checkpoint.RunCheckpoint

MAP_FILE = map_file.NAME


@typed
def locate(src: str | Path) -> Path:
    """The path of a checkpoint: the path itself, the only GGUF file in it, or a hub id's once it is fetched.

    A GGUF file in a bucket is fetched into the cache, too.

    Raises:
      HeadshareError: an empty name, or neither a path nor a hub id that can be fetched.
    """
    name = str(src)
    if not name.strip():
        raise HeadshareError("The name of the checkpoint is empty; give a folder, a .gguf file or a hub id.")
    path, at_hub = storage.path(src), False
    if storage.in_bucket(path):
        recover(path)
        with storage.reached(path):
            if path.exists():
                path = _only_gguf(path)
                return fetched.local(path) if path.is_file() else path
        raise HeadshareError(f"{name[:200]} does not exist; check the name and the bucket.")
    with suppress(OSError, ValueError):  # of a name that no file can have
        recover(path.resolve())
        if path.exists():
            return _only_gguf(path)
        at_hub = huggingface.is_hub_id(name) and not path.parent.exists()
    if at_hub:
        return huggingface.fetch(name)
    raise HeadshareError(f"{name[:200]} does not exist; give a folder, a .gguf file or a hub id (owner/model).")


def _only_gguf(path: Path) -> Path:
    if not path.is_dir() or native.is_native(path) or (path / "config.json").is_file():
        return path
    files = list(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else path


@typed
def open_checkpoint(src: str | Path) -> Checkpoint:
    """Opens a checkpoint of any kind without reading its weights; every tensor's name, shape and type is checked.

    Args:
      src: native or Hugging Face folder, GGUF file, hub id, or the folder of a PostShare run, of which its newest
        checkpoint is opened, or of one of its checkpoints.

    Raises:
      HeadshareError: nothing there, an unsupported architecture, or a damaged checkpoint.

    Examples:
      >>> source = hs.open_checkpoint("my-llama")
      >>> source.read("k_pool_pdh", layer=0).shape
      (2, 64, 16)
    """
    path = locate(src)
    with storage.reached(path):
        return _opened(path)


def _opened(path: Path) -> Checkpoint:
    if path.is_file():
        return gguf_file.open_file(path)
    if run_checkpoint.is_here(path):
        return run_checkpoint.RunCheckpoint(run_checkpoint.chosen(path))
    if native.is_native(path):
        return native.NativeCheckpoint(path)
    if compact.is_compact(path):
        return compact.open_directory(path)
    if (path / "config.json").is_file():
        return huggingface.open_directory(path)
    if (path / native_document.WEIGHTS / "_METADATA").is_file():
        raise HeadshareError(
            f"{path} has weights but no {native_document.DOCUMENT}: it was written or copied only in part; "
            "make it again."
        )
    raise HeadshareError(
        f"{path} holds no checkpoint: no {native_document.DOCUMENT} (native), no config.json (Hugging Face), and "
        f"{'more than one' if any(path.glob('*.gguf')) else 'no'} .gguf file."
    )


def tokenizer_place(src: str | Path) -> Path:
    """Where the tokenizer of a checkpoint is; errors as of `locate`."""
    path = locate(src)
    if path.is_dir() and run_checkpoint.is_here(path):
        return locate(run_checkpoint.RunCheckpoint(run_checkpoint.chosen(path)).model)
    return path


def verify(src: str | Path, *, progress: integrity.Progress = lambda done, total: None) -> integrity.Verified:
    """Reads a whole checkpoint and compares it with its checksums; only the native format carries any.

    Args:
      src: as for `open_checkpoint`.
      progress: called with the pieces read and in all.

    Raises:
      HeadshareError: something is damaged, missing or one too many; all of it is named, up to ten places.

    Examples:
      >>> convert.verify("my-llama").checksums
      True
    """
    path = locate(src)
    if native.is_native(path):
        return integrity.verify_native(path, progress)
    source = open_checkpoint(path)
    assert not isinstance(source, native.NativeCheckpoint)
    return integrity.verify_tensors(source, progress)


@typed
def save(
    source: WeightSource,
    dst: str | Path,
    *,
    to: str = "native",
    tokenizer_from: "str | Path | PreTrainedTokenizerBase | None" = None,
    quantize: str | None = None,
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
    documents: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a model; the output appears complete or not at all.

    Args:
      source: a model, or an opened checkpoint, which is converted without ever being in memory as a whole.
      dst: folder to make, or for `gguf` the file. What a killed process left of the same conversion of a
        checkpoint is gone on with.
      to: `native` (a shared model stays small), `hf` (the family's own class, a shared model at its full size),
        `hf-compact` (a shared model stays small, and runs so in PyTorch with `trust_remote_code=True`) or `gguf` (for
        llama.cpp: dropped heads are left out, a model that shares is at its full size). Those of `hf` have its map and
        a model card beside it. How the model is meant to be sampled (`generation_config.json`) is carried along.
      tokenizer_from: tokenizer to carry along, or the name of the checkpoint that has it.
      quantize: for `gguf`, the type of matrices, such as `q8_0`; by default each keeps its own.
      overwrite: replace an existing output, if this program wrote all of it; never what the model is read from, what
        that lies in, or what lies in that.
      provenance: plain data, such as the source's name, to keep in a native checkpoint's `headshare.json` or a GGUF
        file's metadata, or to tell in a model card.
      documents: texts to keep beside the weights, by file name; in a GGUF file, in its metadata.
      progress: called with the slices of parameters that are read, and in all.

    Raises:
      HeadshareError: unknown format or type, an output that exists, or one that cannot be written.

    Examples:
      >>> hs.save(shared, "my-llama-compact", to="hf-compact", tokenizer_from="my-llama")
    """
    dst = storage.path(dst)
    if storage.is_name(tokenizer_from):
        tokenizer_from = tokenizer_place(tokenizer_from)
    check_output(dst, to, quantize=quantize, overwrite=overwrite, sources=(source, tokenizer_from))
    beside = tokenizer_from if storage.is_name(tokenizer_from) else None
    license = None if beside is None else card.license_of(beside)
    told = ({} if license is None else {"license": license}) | dict(provenance or {})
    files = paths((source, tokenizer_from))
    key = written.key(source, [to, quantize, told, dict(documents or {}), [storage.version(file) for file in files]])
    source = source if progress is None else WatchedView(source, progress)
    generation: dict[str, Any] = next(filter(None, map(generation_config.read, files)), {})
    if to == "gguf":
        with atomic.new_long_file(dst, overwrite=overwrite, keep=files, key=key) as file:
            gguf_writer.write(
                source, file, name=_readable(dst.stem), quantize=quantize, tokenizer_from=tokenizer_from,
                provenance=told, documents=documents, generation=generation, notes=Written(file.parent, key),
            )  # fmt: skip
        return
    with atomic.new_directory(dst, overwrite=overwrite, keep=files, key=key) as folder:
        notes = Written(folder, key)
        if tokenizer_from is not None:
            tokenizer.carry(tokenizer_from, folder)
        if generation:
            generation_config.carry(generation, folder, source.config)
        for name, document in (documents or {}).items():
            (folder / name).write_text(document, encoding="utf-8")
        # What tells that the folder is whole comes last: `headshare.json`, which answers for all that lies beside the
        # weights, or `config.json`.
        if to == "native":
            native_writer.write(source, folder, provenance=told, notes=notes)
            return
        if source.sharing is not None:
            (folder / MAP_FILE).write_text(source.sharing.to_json(), encoding="utf-8")
        text = card.card(source, to, dst.name, told, list(documents or ()))
        (folder / card.NAME).write_text(_readable(text), encoding="utf-8")
        (huggingface if to == "hf" else compact).write(source, folder, notes=notes)
        notes.end()


def _readable(text: str) -> str:
    """Text that can be written: a file's name may hold bytes that are no UTF-8."""
    return text.encode(errors="backslashreplace").decode()
