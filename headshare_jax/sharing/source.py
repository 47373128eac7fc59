"""Sources of weights: the protocol by which everything reads a model, what a map stores of one, and fingerprints."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.parameters import (
    PARAMETERS,
    PROJECTIONS,
    heads_per_layer,
    layered_names,
    parameter_names,
    pool_name,
    slice_shape,
)
from headshare_jax.sharing.columns import to_columns, to_heads
from headshare_jax.sharing.map import SharingMap

# Bytes; XLA's CPU buffers begin at multiples of it.
ALIGNMENT = 64
# A piece of a table is at most so large.
TABLE_BYTES = 64 * 2**20


class WeightSource(Protocol):
    """Anything that gives a model's weights one layer at a time: a checkpoint, a model in memory, or a view of one."""

    @property
    def config(self) -> LlamaConfig: ...

    @property
    def sharing(self) -> SharingMap | None:
        """Who shares with whom; None for a dense model."""

    def dtype(self, name: str) -> np.dtype:
        """Stored type of a parameter."""

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        """A parameter's slice for one layer, or the whole of one that has no layers.

        Pools are read as the layer's own heads: a receiver's slot holds its donor's weights, a dropped one's zeros.
        The shape is `slice_shape(config, name)`.

        Args:
          name: a parameter.
          layer: the layer, for a parameter that has layers.
          rows: those of the slice that are wanted, ascending, at least one; by default all. Only pools, whose rows are
            the layer's heads, and what has no layers are asked for rows. No others need be read.
        """


def stored_shape(config: LlamaConfig, name: str, sharing: SharingMap | None = None) -> tuple[int, ...]:
    """Shape of a parameter as a model holds it: layers stacked, pools with one row per stored head.

    A map with widths has them with one row per stored column: [C, D], biases [C].
    """
    shape, parameter = slice_shape(config, name), PARAMETERS[name]
    if parameter.pool is not None and sharing is not None:
        row = shape[1:] if sharing.widths is None else (config.hidden_size,) * ("d" in parameter.axes)
        return (len(sharing.stored_slots(parameter.pool)), *row)
    if parameter.pool is not None:
        return (config.num_layers * shape[0], *shape[1:])
    return (config.num_layers, *shape) if parameter.layered else shape


def pool_index(config: LlamaConfig, projection: str, sharing: SharingMap | None = None) -> np.ndarray:
    """Pool row of every head, int32 [L, N] for q and o, [L, K] for k and v; the identity for a dense model.

    A dropped head's is P, one past the last row. A map with widths has one for every column of each head, [L, N * H] or
    [L, K * H], P also for one that is cut.
    """
    if sharing is not None:
        return sharing.pool_index(projection)
    heads = heads_per_layer(config, projection)
    return np.arange(config.num_layers * heads, dtype=np.int32).reshape(config.num_layers, heads)


def slots_per_head(sharing: SharingMap | None) -> int:
    """Pool rows that a whole head takes: 1, or H for a map with widths."""
    return 1 if sharing is None else sharing.slots_per_head


def read_heads(
    source: WeightSource,
    name: str,
    layer: int,
    heads: Sequence[int] | None,
    read_rows: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Heads of a stored pool, as `WeightSource.read` gives them.

    Args:
      source: what the pool belongs to.
      name: a pooled parameter.
      layer: as for `WeightSource.read`.
      heads: likewise.
      read_rows: gives the pool's rows at some indices, int32 [n], at least one.
    """
    projection = PARAMETERS[name].pool
    assert projection is not None
    stored, slots = stored_shape(source.config, name, source.sharing), slots_per_head(source.sharing)
    index = pool_index(source.config, projection, source.sharing)[layer]
    index = index if heads is None else index.reshape(-1, slots)[list(heads)].ravel()
    kept = index < stored[0]
    if kept.all() and len(index):
        return to_heads(name, read_rows(index), slots)
    values = np.zeros((len(index), *stored[1:]), source.dtype(name))
    if kept.any():
        values[kept] = read_rows(index[kept])
    return to_heads(name, values, slots)


def runs(starts: np.ndarray, width: int = 1) -> list[slice]:
    """Slices `width` wide from each of some starts, int [n], ascending; those that lie side by side are one."""
    found = np.split(starts, np.flatnonzero(np.diff(starts) != width) + 1)
    return [slice(int(run[0]), int(run[-1]) + width) for run in found]


def piece_shape(config: LlamaConfig, name: str, dtype: np.dtype) -> tuple[int, ...]:
    """Shape of the most of a parameter that is read or written at once: a layer's slice, or some rows of a table.

    Tables, which have no layers, are cut into equal pieces of at most `TABLE_BYTES` in the type that they are stored
    in; one whose number of rows has no fitting divisor is one piece.
    """
    shape = slice_shape(config, name)
    if PARAMETERS[name].layered:
        return shape
    return (table_rows(shape, dtype), *shape[1:])


def table_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Rows of a piece of a table, as `piece_shape` has it."""
    # Unequal pieces would not do: a native checkpoint stores each as a chunk, and a smaller last chunk would take a
    # whole one's place on disk, with nothing to check the rest.
    rows = shape[0]
    least = max(1, math.ceil(math.prod(shape) * dtype.itemsize / TABLE_BYTES))
    return rows // next((count for count in range(least, 16 * least) if rows % count == 0), 1)


def read_held(
    source: WeightSource,
    name: str,
    layer: int | None,
    rows: Sequence[int] | None,
    held: Callable[[int | np.ndarray | None], np.ndarray],
) -> np.ndarray:
    """What `WeightSource.read` gives, of a model that holds every parameter as `stored_shape` says.

    Args:
      source: the model.
      name, layer, rows: as for `WeightSource.read`.
      held: gives a row of the leading axis, which is then no axis of the result; some of its rows; all for None.
    """
    if layer is None:
        return held(None if rows is None else np.asarray(rows))
    return held(layer) if PARAMETERS[name].pool is None else read_heads(source, name, layer, rows, held)


def stored_rows(source: WeightSource, name: str) -> Iterator[tuple[slice, int | None, Sequence[int] | None]]:
    """Of a parameter, in order: rows of its leading axis, and the layer and rows that `read_rows` is to give them by.

    A layer is one row, of a pool those that the layer stores: heads of it, or columns of heads. Layers of which nothing
    is stored are left out. What has no layers comes in pieces (`piece_shape`).
    """
    if not PARAMETERS[name].layered:
        count = slice_shape(source.config, name)[0]
        step = piece_shape(source.config, name, _innermost(source).dtype(name))[0]
        for start in range(0, count, step):
            rows = slice(start, start + step)
            yield rows, None, None if step == count else range(count)[rows]
        return
    projection, start = PARAMETERS[name].pool, 0
    owns = None if source.sharing is None or projection is None else source.sharing.owns_weights(projection)
    for layer in range(source.config.num_layers):
        count, heads = 1 if projection is None else slice_shape(source.config, name)[0], None
        if owns is not None:
            owns_nh = owns[layer].reshape(count, -1)
            stored_n = owns_nh.any(axis=1)
            heads = None if stored_n.all() else np.flatnonzero(stored_n).tolist()
            count = int(owns_nh.sum())
        if count:
            yield slice(start, start + count), layer, heads
            start += count


def read_rows(source: WeightSource, name: str, layer: int | None, rows: Sequence[int] | None) -> np.ndarray:
    """Rows of a stored parameter, as `stored_rows` names them."""
    values, projection = source.read(name, layer, rows), PARAMETERS[name].pool
    if layer is None or source.sharing is None or source.sharing.widths is None or projection is None:
        return values if layer is None or projection is not None else values[None]
    owns_nh = source.sharing.owns_weights(projection)[layer].reshape(-1, source.sharing.slots_per_head)
    return to_columns(name, values)[(owns_nh if rows is None else owns_nh[list(rows)]).ravel()]


def stored_layers(source: WeightSource, name: str) -> Iterator[tuple[slice, np.ndarray]]:
    """What a model stores of a parameter, in order: rows of its leading axis, and their values."""
    for rows, layer, wanted in stored_rows(source, name):
        yield rows, read_rows(source, name, layer, wanted)


def path_of(source: WeightSource) -> Path | None:
    """The file or folder of a checkpoint, or of the one that a view reads; None for a model in memory."""
    return getattr(_innermost(source), "path", None)


def _innermost(source: WeightSource) -> WeightSource:
    """What a view, or a view of views, reads."""
    while (base := getattr(source, "base", None)) is not None:
        source = base
    return source


def assemble(source: WeightSource, name: str) -> np.ndarray:
    """A whole parameter of a source as a model stores it; peak memory is the parameter and one layer's slice.

    What is built from layers is aligned, so that a CPU's JAX can take it without a copy (`jax.device_put`).
    """
    if not PARAMETERS[name].layered:
        return source.read(name)
    value = _aligned(stored_shape(source.config, name, source.sharing), source.dtype(name))
    for rows, layer in stored_layers(source, name):
        value[rows] = layer
    return value


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array, not filled, that begins at a multiple of `ALIGNMENT` bytes."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def fingerprint(source: WeightSource) -> str:
    """SHA-256 over checksums of the attention weights as float32, whatever the format or storage dtype.

    16-bit weights and their exact float32 copies have the same fingerprint; a receiver counts as holding its donor's
    weights. The checksums tell weights apart that differ by training or by accident, not ones made to collide. The
    four projections of a layer are in memory at a time.

    Examples:
      >>> hs.fingerprint(model) == hs.fingerprint(hs.open_checkpoint("my-llama"))
      True
    """
    return _sha256(_layer_checksums(source, [pool_name(projection) for projection in PROJECTIONS]))


def whole_fingerprint(source: WeightSource) -> str:
    """As `fingerprint`, but of the architecture and all weights; one layer's are in memory at a time."""
    layered = layered_names(source.config)
    whole = [name for name in parameter_names(source.config) if name not in layered]
    architecture = json.dumps(source.config.to_json(), sort_keys=True).encode()
    checksums = (_checksums(source.read(name)) for name in whole)
    return _sha256(chain([architecture], checksums, _layer_checksums(source, layered)))


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def _layer_checksums(source: WeightSource, names: Sequence[str]) -> Iterator[bytes]:
    """Checksums of some parameters, layer by layer."""
    with ThreadPoolExecutor(len(PROJECTIONS)) as threads:
        for layer in range(source.config.num_layers):
            yield from threads.map(_checksums, [source.read(name, layer) for name in names])


def _checksums(values: np.ndarray) -> bytes:
    """Sums modulo 2^32 of the bits of every matrix's rows and columns; all bits of a vector.

    Exchanging, moving or changing values changes them. A cryptographic hash of all bits takes 4 times as long.
    """
    bits = np.asarray(values, np.float32).view(np.uint32)
    if bits.ndim == 1:
        return bits.tobytes()
    return b"".join(np.add.reduce(bits, axis=axis, dtype=np.uint32).tobytes() for axis in (-1, -2))
