"""Reading a whole checkpoint to find all that is damaged."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headshare_jax.convert import native_document, storage
from headshare_jax.convert.native import NativeCheckpoint, stored_array
from headshare_jax.convert.native_array import StoredArray
from headshare_jax.convert.native_document import named
from headshare_jax.convert.run_checkpoint import RunCheckpoint
from headshare_jax.convert.tensor_files import TensorCheckpoint
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import layered_names, parameter_names

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verified:
    """What was read of a checkpoint in which nothing is damaged.

    Attributes:
      files: files that were read.
      chunks: stored pieces that were read, each compared with its checksum if there are any; tensors, or what is read
        of one at a time, in a checkpoint that is not native.
      bytes: of these files.
      checksums: the checkpoint carries checksums. Without them, damaged values that are still numbers go unnoticed.
    """

    files: int
    chunks: int
    bytes: int
    checksums: bool


def verify_native(path: Path, progress: Progress) -> Verified:
    """Reads a native checkpoint; errors as of `convert.verify`."""
    document = native_document.read(path)
    checksums = native_document.has_checksums(document)
    if checksums:
        problems = list(native_document.damaged_files(path, document))
        arrays = list(_readable(path, document))
        names = {native_document.DOCUMENT, *document["files"]}
    else:
        arrays, problems, names = list(NativeCheckpoint(path).arrays.values()), [], None
    shards = [(array, rows) for array in arrays for rows in array.shards()]
    for done, (array, rows) in enumerate(shards):
        problems += array.damaged(rows)
        progress(done + 1, len(shards))
    _refuse(path, problems)
    if checksums:
        # What is whole can still not fit together.
        NativeCheckpoint(path)
    sizes = [size for name, size in storage.files(path).items() if names is None or name in names]
    return Verified(len(sizes), sum(array.chunks for array in arrays), sum(sizes), checksums)


def _readable(path: Path, document: dict[str, Any]) -> Iterator[StoredArray]:
    """The arrays that can be opened; of others, a file is damaged."""
    for name in document[native_document.SUMS]:
        with suppress(HeadshareError):
            yield stored_array(path, document, name)


def verify_tensors(source: TensorCheckpoint | RunCheckpoint, progress: Progress) -> Verified:
    """Reads every tensor of a checkpoint that is not native; errors as of `convert.verify`."""
    layers, layered = range(source.config.num_layers), layered_names(source.config)
    places = [
        (name, layer) for name in parameter_names(source.config) for layer in (layers if name in layered else [None])
    ]
    problems: dict[str, None] = {}
    for done, (name, layer) in enumerate(places):
        try:
            source.read(name, layer)
        except HeadshareError as error:
            problems[str(error).rstrip(".")] = None
        progress(done + 1, len(places))
    _refuse(source.path, list(problems))
    if isinstance(source, RunCheckpoint):
        sizes = storage.files(source.path).values()
        return Verified(len(sizes), len(places), sum(sizes), True)
    infos, _ = source.reader.infos()
    files = {info.file for info in infos.values()}
    return Verified(len(files), len(infos), sum(file.stat().st_size for file in files), False)


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise HeadshareError(f"{path} is damaged: {named(problems)}; copy or make it again.")
