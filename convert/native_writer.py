"""Writing the native format: an Orbax checkpoint, array after array, and `headshare.json` beside it."""

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from headshare_jax import parameters
from headshare_jax.convert import bucket_errors, native_array, native_document, storage
from headshare_jax.convert.native_array import Deferred
from headshare_jax.convert.partial import temporary_folder
from headshare_jax.convert.written import Written
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PARAMETERS, PROJECTIONS, index_name
from headshare_jax.sharing.source import WeightSource, pool_index, read_rows, stored_rows, stored_shape


def write(
    source: WeightSource,
    folder: Path,
    *,
    provenance: dict[str, Any] | None = None,
    notes: Written | None = None,
) -> None:
    """Writes a source into an existing folder, each layer read once.

    Peak memory is a few layers' slices of a parameter, or a few pieces of one without layers.

    Args:
      source: a model or an opened checkpoint; a shared one stores each head once.
      folder: a folder that holds no more than what shall lie beside the weights, such as a tokenizer.
      provenance: plain data to keep in `headshare.json`, such as where the weights came from.
      notes: of what the folder holds already; none by default.

    Raises:
      OSError: the folder cannot be written to.
    """
    config, names = source.config, parameters.parameter_names(source.config)
    notes = notes or Written()
    tree = {name: _parameter(source, name, notes.threads) for name in names}
    for projection in PROJECTIONS:
        index = pool_index(config, projection, source.sharing)
        tree[index_name(projection)] = Deferred(
            index.shape, index.dtype, False, [(slice(0, len(index)), partial(np.asarray, index))]
        )
    sums = _store(tree, storage.absolute(folder) / native_document.WEIGHTS, notes)
    notes.end()
    document = {
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
        native_document.SUMS: {name: " ".join(sums[name]) for name in tree},
    }
    native_document.write(folder, document)


def _parameter(source: WeightSource, name: str, threads: int) -> Deferred:
    shape = stored_shape(source.config, name, source.sharing)
    parts = (
        (rows, partial(read_rows, source, name, layer, wanted)) for rows, layer, wanted in stored_rows(source, name)
    )
    return Deferred(shape, source.dtype(name), PARAMETERS[name].layered, parts, threads)


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
def _store(tree: dict[str, Deferred], path: Path, notes: Written) -> dict[str, list[str]]:
    """Writes arrays as an Orbax checkpoint, and gives the checksums of their chunks."""
    if storage.in_bucket(path):
        # Orbax knows folders alone: what it writes beside the arrays is small, and is put there afterwards.
        with temporary_folder() as folder:
            sums = _store_at(tree, folder / path.name, path, notes)
            for name in storage.files(folder / path.name):
                storage.upload(folder / path.name / name, path / name)
        return sums
    return _store_at(tree, path, path, notes)


def _store_at(tree: dict[str, Deferred], path: Path, weights: Path, notes: Written) -> dict[str, list[str]]:
    """The same with the arrays at `weights` and all else at `path`."""
    arrays = _DeferredHandler(weights, notes)
    registry = type_handlers.create_type_handler_registry((Deferred, arrays))
    # One process writes all of it; in a distributed program the others do not come here, so it must not wait for them.
    mine = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix="headshare"
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry, multiprocessing_options=alone
    )
    path.mkdir(exist_ok=True)
    try:
        # Without Orbax's Checkpointer, which adds times and a path of this machine.
        handler.save(path, args=ocp.args.PyTreeSave(tree))
        handler.finalize(path)
    except ValueError as error:
        if refusal := storage.refusal_at(error, weights):
            raise refusal from error
        reason = bucket_errors.system_error(error)
        if reason is None or isinstance(error, HeadshareError):
            raise
        raise reason from error
    finally:
        handler.close()
    return arrays.sums


class _DeferredHandler(type_handlers.NumpyHandler):  # type: ignore[misc]
    """Writes deferred arrays one after another; Orbax's own handlers take all of them at once, each one whole.

    Attributes:
      weights: the folder of arrays.
      notes: of what that holds already.
      sums: the checksums of every array's chunks, once it is written.
    """

    def __init__(self, weights: Path, notes: Written) -> None:
        super().__init__()
        self.weights, self.notes = weights, notes
        self.sums: dict[str, list[str]] = {}

    async def serialize(
        self,
        values: Sequence[Deferred],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Future[Any]]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            self.sums[info.name] = native_array.write(self.weights / info.name, value, self.notes)
        return []
