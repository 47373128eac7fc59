"""The native format: an Orbax checkpoint of the parameter tree, and `headshare.json` beside it."""

import json
import logging
import math
import os
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from headshare_jax import parameters
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PARAMETERS, PROJECTIONS, index_name
from headshare_jax.sharing import finite
from headshare_jax.sharing.ledger import described
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource, pool_index, read_heads, stored_layers, stored_shape

DOCUMENT, WEIGHTS = "headshare.json", "weights"
FORMAT, VERSION = "headshare-native", 1
# Parameters without layers are cut into chunks of about this size; the others have one for each layer or pool row.
CHUNK_BYTES = 64 * 2**20
FLOATS = ("float32", "bfloat16", "float16")
# What TensorStore raises, by the kind of damage.
_UNREADABLE = (ValueError, OSError, RuntimeError, IndexError, KeyError, NotImplementedError, OverflowError)


def is_native(path: Path) -> bool:
    """Whether a folder is a native checkpoint."""
    return (path / DOCUMENT).is_file()


class NativeCheckpoint:
    """A native checkpoint on disk, as a `WeightSource`; reads no more than the layer asked for.

    Attributes:
      provenance: plain data that was kept with it.

    Raises:
      HeadshareError: `headshare.json` is unreadable, or the stored arrays are not those that it describes.
    """

    def __init__(self, path: Path):
        self.path = path
        document = _read_document(path / DOCUMENT)
        self.provenance = _provenance(document)
        try:
            self.config = LlamaConfig.from_json(document["config"])
            shared = document["sharing"]
            self.sharing = None if shared is None else SharingMap.from_json(json.dumps(shared))
        except (KeyError, TypeError, AttributeError) as error:
            raise HeadshareError(f"{path / DOCUMENT} lacks or garbles a field ({error!r}).") from error
        if self.sharing is not None:
            self.sharing.check_model(self.config)
        names = (*parameters.parameter_names(self.config), *map(index_name, PROJECTIONS))
        self._arrays = {name: self._open(name) for name in names}
        self._check_arrays()
        for projection in PROJECTIONS:
            self._check_index(projection)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({described(self)})"

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(self._arrays[name].dtype.numpy_dtype)

    def read(self, name: str, layer: int | None = None, heads: Sequence[int] | None = None) -> np.ndarray:
        array = self._arrays[name]
        if layer is None:
            return self._weights(array, name, layer)
        if PARAMETERS[name].pool is None:
            return self._weights(array[layer], name, layer)
        return read_heads(self, name, layer, heads, lambda rows: self._weights(array[rows], name, layer))

    def _weights(self, array: ts.TensorStore, name: str, layer: int | None) -> np.ndarray:
        return finite.check_weights(self._values(array, name), finite.slice_name(name, layer), self.path)

    def _values(self, array: ts.TensorStore, name: str) -> np.ndarray:
        try:
            return np.asarray(array.read().result())
        except _UNREADABLE as error:
            raise HeadshareError(
                f"{self.path / WEIGHTS / name} is incomplete or corrupt ({error}); copy or make it again."
            ) from error

    def _open(self, name: str) -> ts.TensorStore:
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{self.path.resolve() / WEIGHTS / name}/"},
            # A lost chunk must be an error, never zeros.
            "fill_missing_data_reads": False,
        }
        try:
            return ts.open(spec, open=True).result()
        except _UNREADABLE as error:
            raise HeadshareError(
                f"{self.path / WEIGHTS} has no readable array {name}; the copy is incomplete, make it again."
            ) from error

    def _check_arrays(self) -> None:
        """Compares every array's shape and type with those that the configuration and the map call for."""
        problems = []
        for name in parameters.parameter_names(self.config):
            problems += self._mismatch(name, stored_shape(self.config, name, self.sharing), FLOATS)
        for projection in PROJECTIONS:
            shape = (self.config.num_layers, parameters.heads_per_layer(self.config, projection))
            problems += self._mismatch(index_name(projection), shape, ("int32",))
        if problems:
            raise HeadshareError(f"The arrays in {self.path} do not fit {DOCUMENT}: {'; '.join(problems)}.")

    def _mismatch(self, name: str, shape: tuple[int, ...], types: Collection[str]) -> list[str]:
        array = self._arrays[name]
        problems = []
        if array.shape != shape:
            problems.append(f"{name} has shape {list(array.shape)} instead of {list(shape)}")
        if array.dtype.name not in types:
            problems.append(f"{name} holds {array.dtype.name} instead of {' or '.join(types)}")
        return problems

    def _check_index(self, projection: str) -> None:
        name = index_name(projection)
        expected = pool_index(self.config, projection, self.sharing)
        if not np.array_equal(self._values(self._arrays[name], name), expected):
            raise HeadshareError(f"{name} in {self.path} disagrees with the map in {DOCUMENT}.")


def write(source: WeightSource, folder: Path, *, provenance: dict[str, Any] | None = None) -> None:
    """Writes a source into an existing folder, each layer read once.

    Peak memory is a few layers' slices of a parameter, or the largest parameter without layers and a few chunks.

    Args:
      source: a model or an opened checkpoint; a shared one stores each head once.
      folder: an empty folder.
      provenance: plain data to keep in `headshare.json`, such as where the weights came from.

    Raises:
      OSError: the folder cannot be written to.
    """
    config, names = source.config, parameters.parameter_names(source.config)
    tree = {name: _parameter(source, name) for name in names}
    for projection in PROJECTIONS:
        index = pool_index(config, projection, source.sharing)
        tree[index_name(projection)] = _Deferred(index.shape, index.dtype, False, [(slice(0, len(index)), index)])
    _store(tree, folder.resolve() / WEIGHTS)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"headshare-jax {version('headshare-jax')}",
        "provenance": provenance or {},
        "config": config.to_json(),
        "parameters": {
            name: {
                "shape": stored_shape(config, name, source.sharing),
                "dtype": str(source.dtype(name)),
            }
            for name in names
        },
        "sharing": None if source.sharing is None else json.loads(source.sharing.to_json()),
    }
    (folder / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax would warn of each setting that is chosen here on purpose."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@_without_warnings()
def _store(tree: dict[str, "_Deferred"], path: Path) -> None:
    registry = type_handlers.create_type_handler_registry((_Deferred, _DeferredHandler()))
    # One process writes all of it; in a distributed program the others do not come here, so it must not wait for them.
    mine = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix="headshare"
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, type_handler_registry=registry, multiprocessing_options=alone
    )
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    except ValueError as error:
        # TensorStore tells the system's own reason only in its text.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None or isinstance(error, HeadshareError):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


@dataclass(frozen=True)
class _Deferred:
    """An array that is read, part after part, only when its turn to be written comes.

    Attributes:
      shape, dtype: of all of it.
      layered: there is a chunk for each row of its leading axis.
      parts: rows of that axis and their values, in order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    layered: bool
    parts: Iterable[tuple[slice, np.ndarray]]


def _parameter(source: WeightSource, name: str) -> _Deferred:
    def whole() -> Iterator[tuple[slice, np.ndarray]]:
        yield slice(0, shape[0]), source.read(name)

    shape, layered = stored_shape(source.config, name, source.sharing), PARAMETERS[name].layered
    return _Deferred(shape, source.dtype(name), layered, stored_layers(source, name) if layered else whole())


class _DeferredHandler(type_handlers.NumpyHandler):  # type: ignore[misc]
    """Writes deferred arrays one after another; Orbax's own handlers take all of them at once, each one whole."""

    async def serialize(
        self,
        values: Sequence[_Deferred],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Future[Any]]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            _write_array(Path(info.parent_dir) / info.name, value)
        return []


def _write_array(path: Path, value: _Deferred) -> None:
    """Writes a plain zarr array: weights do not compress, and a layer or a head can be read by itself."""
    row_bytes = math.prod(value.shape[1:]) * value.dtype.itemsize
    # Chunks are equal, since the last one takes a whole chunk's place on disk.
    most = 1 if value.layered else max(1, CHUNK_BYTES // row_bytes)
    chunk = math.ceil(value.shape[0] / math.ceil(value.shape[0] / most))
    at_once = max(1, CHUNK_BYTES // (chunk * row_bytes))
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {"compressor": None, "chunks": (chunk, *value.shape[1:])},
    }
    array = ts.open(spec, create=True, dtype=value.dtype, shape=value.shape).result()
    writes: deque[ts.WriteFutures] = deque()
    try:
        for rows, values in value.parts:
            for start in range(rows.start, rows.stop, chunk):
                piece = values[start - rows.start :][:chunk]
                writes.append(array[start : start + len(piece)].write(piece))
                if len(writes) > at_once:
                    writes.popleft().result()
        for write in writes:
            write.result()
    finally:
        # So that after an error none goes on behind the back of whoever cleans up.
        for write in writes:
            write.exception()


def _provenance(document: dict[str, Any]) -> dict[str, Any]:
    stored = document.get("provenance")
    return stored if isinstance(stored, dict) else {}


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise HeadshareError(f"{path} is not readable JSON ({error}); copy it again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise HeadshareError(f'{path} is not a {FORMAT} document (its "format" says otherwise).')
    if document.get("version") != VERSION:
        raise HeadshareError(f"{path} has version {document.get('version')!r}; this release reads version {VERSION}.")
    return document
