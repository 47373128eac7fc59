"""The native format: an Orbax checkpoint of the parameter tree, and `headshare.json` beside it. Reading it.

Every stored chunk has a checksum in the document, which is verified as the chunk is read.
"""

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headshare_jax import parameters
from headshare_jax.config import LlamaConfig
from headshare_jax.convert import native_document
from headshare_jax.convert.native_array import StoredArray
from headshare_jax.convert.native_document import DOCUMENT, WEIGHTS
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PARAMETERS, PROJECTIONS, index_name
from headshare_jax.sharing import finite
from headshare_jax.sharing.ledger import described
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import pool_index, read_heads, slots_per_head, stored_shape

logger = logging.getLogger(__name__)

FLOATS = ("float32", "bfloat16", "float16")


def is_native(path: Path) -> bool:
    """Whether a folder is a native checkpoint."""
    return (path / DOCUMENT).is_file()


def check_files(path: Path) -> None:
    """Raises HeadshareError if a folder is a native checkpoint whose files, but for values, are not as written."""
    if is_native(path):
        native_document.check_files(path, native_document.read(path))


class NativeCheckpoint:
    """A native checkpoint on disk, as a `WeightSource`; reads no more than the layer asked for, and verifies it.

    Attributes:
      provenance: plain data that was kept with it.
      checksums: whether it carries any.
      arrays: what is stored, by name: parameters, and the index of every projection.

    Raises:
      HeadshareError: `headshare.json` is unreadable or was edited, a file is missing, one too many or not as it was
        written, or the stored arrays are not those that the document describes.
    """

    def __init__(self, path: Path):
        self.path = path
        document = native_document.read(path)
        self.provenance = _provenance(document)
        try:
            self.config = LlamaConfig.from_json(document["config"])
            shared = document["sharing"]
            self.sharing = None if shared is None else SharingMap.from_json(json.dumps(shared))
        except (KeyError, TypeError, AttributeError) as error:
            raise HeadshareError(f"{path / DOCUMENT} lacks or garbles a field ({error!r}).") from error
        if self.sharing is not None:
            self.sharing.check_model(self.config)
        native_document.check_files(path, document)
        names = (*parameters.parameter_names(self.config), *map(index_name, PROJECTIONS))
        self.arrays = {name: stored_array(path, document, name) for name in names}
        self._check_arrays()
        for projection in PROJECTIONS:
            self._check_index(projection)
        self.checksums = native_document.has_checksums(document)
        if not self.checksums:
            logger.warning("%s was written without checksums, so damage can go unnoticed; convert it anew.", path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({described(self)})"

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.arrays[name].dtype

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        array = self.arrays[name]
        if layer is None:
            return self._finite(array.read() if rows is None else array.read_within(rows), name, layer)
        if PARAMETERS[name].pool is None:
            return self._finite(array.read(slice(layer, layer + 1))[0], name, layer)
        return read_heads(self, name, layer, rows, lambda stored: self._finite(array.read(stored), name, layer))

    def _finite(self, values: np.ndarray, name: str, layer: int | None) -> np.ndarray:
        return finite.check_weights(values, finite.slice_name(name, layer), self.path)

    def _check_arrays(self) -> None:
        """Compares every array's shape and type with those that the configuration and the map call for."""
        problems = []
        for name in parameters.parameter_names(self.config):
            problems += self._mismatch(name, stored_shape(self.config, name, self.sharing), FLOATS)
        for projection in PROJECTIONS:
            heads = parameters.heads_per_layer(self.config, projection)
            shape = (self.config.num_layers, heads * slots_per_head(self.sharing))
            problems += self._mismatch(index_name(projection), shape, ("int32",))
        if problems:
            raise HeadshareError(f"The arrays in {self.path} do not fit {DOCUMENT}: {'; '.join(problems)}.")

    def _mismatch(self, name: str, shape: tuple[int, ...], types: Collection[str]) -> list[str]:
        array = self.arrays[name]
        problems = []
        if array.shape != shape:
            problems.append(f"{name} has shape {list(array.shape)} instead of {list(shape)}")
        if array.type not in types:
            problems.append(f"{name} holds {array.type} instead of {' or '.join(types)}")
        return problems

    def _check_index(self, projection: str) -> None:
        name = index_name(projection)
        expected = pool_index(self.config, projection, self.sharing)
        if not np.array_equal(self.arrays[name].read(), expected):
            raise HeadshareError(f"{name} in {self.path} disagrees with the map in {DOCUMENT}.")


def stored_array(path: Path, document: dict[str, Any], name: str) -> StoredArray:
    """An array of a checkpoint whose document has been read; errors as of `StoredArray`."""
    sums = None
    if native_document.has_checksums(document):
        sums = document[native_document.SUMS].get(name, "").split()
    return StoredArray(path / WEIGHTS, name, sums)


def _provenance(document: dict[str, Any]) -> dict[str, Any]:
    stored = document.get("provenance")
    return stored if isinstance(stored, dict) else {}
