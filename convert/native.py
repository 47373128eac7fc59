"""The native format: an Orbax checkpoint of the parameter tree, and `headshare.json` beside it."""

import json
from collections.abc import Sequence
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from headshare_jax import parameters
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.modeling import index_name
from headshare_jax.parameters import WeightSource
from headshare_jax.sharing import PROJECTIONS, SharingMap

DOCUMENT, WEIGHTS = "headshare.json", "weights"
FORMAT, VERSION = "headshare-native", 1
# Parameters without layers are cut into chunks of at most this size; the others have one chunk for each layer.
CHUNK_BYTES = 64 * 2**20


def is_native(path: Path) -> bool:
    """Whether a folder is a native checkpoint."""
    return (path / DOCUMENT).is_file()


class NativeCheckpoint:
    """A native checkpoint on disk, as a `WeightSource`; reads no more than the layer asked for.

    Raises:
      HeadshareError: `headshare.json` is unreadable, or the stored arrays are not those that it describes.
    """

    def __init__(self, path: Path):
        self.path = path
        document = _read_document(path / DOCUMENT)
        try:
            self.config = LlamaConfig.from_json(document["config"])
            shared = document["sharing"]
            self.sharing = None if shared is None else SharingMap.from_json(json.dumps(shared))
        except (KeyError, TypeError, AttributeError) as error:
            raise HeadshareError(f"{path / DOCUMENT} lacks or garbles a field ({error!r}).") from error
        if self.sharing is not None:
            self.sharing.check_model(self.config)
        self._arrays = {name: self._open(name) for name in parameters.parameter_names(self.config)}
        self._index = {p: self._checked_index(p) for p in PROJECTIONS}
        self._check_shapes()

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(self._arrays[name].dtype.numpy_dtype)

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        array = self._arrays[name]
        projection = parameters.pooled_projection(name)
        if projection is not None:
            array = array[self._index[projection][layer]]
        elif layer is not None:
            array = array[layer]
        return self._values(array, name)

    def _values(self, array: ts.TensorStore, name: str) -> np.ndarray:
        try:
            return np.asarray(array.read().result())
        except ValueError as error:
            raise HeadshareError(f"{self.path / WEIGHTS / name} is incomplete or corrupt ({error}).") from error

    def _open(self, name: str) -> ts.TensorStore:
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{self.path / WEIGHTS / name}/"},
            # A lost chunk must be an error, never zeros.
            "fill_missing_data_reads": False,
        }
        try:
            return ts.open(spec, open=True).result()
        except ValueError as error:
            raise HeadshareError(
                f"{self.path / WEIGHTS} has no readable array {name}; the copy is incomplete."
            ) from error

    def _checked_index(self, projection: str) -> np.ndarray:
        stored = self._values(self._open(index_name(projection)), index_name(projection))
        expected = parameters.pool_index(self.config, projection, self.sharing)
        if not np.array_equal(stored, expected):
            raise HeadshareError(f"{index_name(projection)} in {self.path} disagrees with the map in {DOCUMENT}.")
        return expected

    def _check_shapes(self) -> None:
        problems = [
            f"{name} has shape {list(array.shape)} instead of {list(expected)}"
            for name, array in self._arrays.items()
            if array.shape != (expected := parameters.stored_shape(self.config, name, self.sharing))
        ]
        if problems:
            raise HeadshareError(f"The arrays in {self.path} do not fit {DOCUMENT}: {'; '.join(problems)}.")


def write(source: WeightSource, folder: Path, *, provenance: dict[str, Any] | None = None) -> None:
    """Writes a source into an existing folder; peak memory is two copies of its largest parameter.

    Args:
      source: a model or an opened checkpoint; a shared one stores each head once.
      folder: an empty folder.
      provenance: plain data to keep in `headshare.json`, such as where the weights came from.
    """
    config, names = source.config, parameters.parameter_names(source.config)
    tree: dict[str, Any] = {name: _Deferred(source, name) for name in names}
    tree |= {index_name(p): parameters.pool_index(config, p, source.sharing) for p in PROJECTIONS}
    save_args = {name: ocp.SaveArgs() for name in tree} | {name: _chunks(source, name) for name in names}
    registry = type_handlers.create_type_handler_registry(
        (_Deferred, _DeferredHandler()), (np.ndarray, type_handlers.NumpyHandler())
    )
    # Plain zarr arrays without compression: weights do not compress, and a layer can be read by itself.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(folder.absolute() / WEIGHTS, args=ocp.args.PyTreeSave(tree, save_args=save_args))
        except ValueError as error:
            raise OSError(f"the weights could not be stored ({error})") from error
    document = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"headshare-jax {version('headshare-jax')}",
        "provenance": provenance or {},
        "config": config.to_json(),
        "parameters": {
            name: {
                "shape": parameters.stored_shape(config, name, source.sharing),
                "dtype": str(source.dtype(name)),
            }
            for name in names
        },
        "sharing": None if source.sharing is None else json.loads(source.sharing.to_json()),
    }
    (folder / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")


class _Deferred:
    """A parameter that is assembled only when its turn to be written comes."""

    def __init__(self, source: WeightSource, name: str):
        self.source, self.name = source, name

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return parameters.assemble(self.source, self.name)


class _DeferredHandler(type_handlers.NumpyHandler):  # type: ignore[misc]
    """Writes deferred parameters one after another, so that one at a time is in memory."""

    async def serialize(
        self,
        values: Sequence[_Deferred],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Future[Any]]:
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            for written in await super().serialize([np.asarray(value)], [info], [arg]):
                written.result()
        return []


def _chunks(source: WeightSource, name: str) -> ocp.SaveArgs:
    if not parameters.is_layered(name):
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
    slice_bytes = source.dtype(name).itemsize * int(np.prod(parameters.slice_shape(source.config, name)))
    return ocp.SaveArgs(chunk_byte_size=slice_bytes, shard_axes=(0,))


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HeadshareError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise HeadshareError(f'{path} is not a {FORMAT} document (its "format" says otherwise).')
    if document.get("version") != VERSION:
        raise HeadshareError(f"{path} has version {document.get('version')!r}; this release reads version {VERSION}.")
    return document
