"""The parameter tree: every name with its shape, and the protocol by which weights are read layer by layer.

A name's suffix spells its axes: `v` vocabulary, `d` width, `f` MLP width, `h` head width, `l` layer, `p` pool row,
`n` the heads of one layer.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.sharing import PROJECTIONS, SharingMap

# Bytes; XLA's CPU buffers begin at multiples of it.
ALIGNMENT = 64


class WeightSource(Protocol):
    """Anything that gives a model's weights one layer at a time: a checkpoint on disk, or a model in memory."""

    @property
    def config(self) -> LlamaConfig: ...

    @property
    def sharing(self) -> SharingMap | None:
        """Who shares with whom; None for a dense model."""

    def dtype(self, name: str) -> np.dtype:
        """Stored type of a parameter."""

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """A parameter's slice for one layer, or the whole of one that has no layers.

        Pools are read as the layer's own heads: a receiver's slot holds its donor's weights, a dropped one's zeros.
        The shape is `slice_shape(config, name)`.
        """


def parameter_names(config: LlamaConfig) -> tuple[str, ...]:
    """Names of all parameters of this architecture, in the order they are stored."""
    names = ["embed_vd", "attn_norm_ld", "q_pool_pdh", "k_pool_pdh", "v_pool_pdh", "o_pool_phd"]
    if config.attention_bias:
        names += ["q_bias_ph", "k_bias_ph", "v_bias_ph", "o_bias_ld"]
    names += ["mlp_norm_ld", "gate_ldf", "up_ldf", "down_lfd"]
    if config.mlp_bias:
        names += ["gate_bias_lf", "up_bias_lf", "down_bias_ld"]
    names.append("final_norm_d")
    if not config.tie_word_embeddings:
        names.append("head_vd")
    return tuple(names)


def axes(name: str) -> str:
    """The axes that a name's suffix spells, e.g. `pdh` for `q_pool_pdh`."""
    return name.rsplit("_", 1)[1]


def pooled_projection(name: str) -> str | None:
    """The projection whose pool rows a parameter is stored by (`q`, `k`, `v` or `o`), or None."""
    return name[0] if axes(name).startswith("p") else None


def pool_name(projection: str) -> str:
    """Parameter that holds the heads of a projection."""
    return f"{projection}_pool_{'phd' if projection == 'o' else 'pdh'}"


def is_layered(name: str) -> bool:
    """Whether a parameter is read layer by layer."""
    return axes(name)[0] in "lp"


def heads_per_layer(config: LlamaConfig, projection: str) -> int:
    """N for q and o, K for k and v."""
    return config.num_heads if projection in "qo" else config.num_kv_heads


def slice_shape(config: LlamaConfig, name: str) -> tuple[int, ...]:
    """Shape of what `WeightSource.read` gives: one layer's slice, or the whole of a parameter without layers."""
    sizes = {
        "v": config.vocab_size,
        "d": config.hidden_size,
        "f": config.intermediate_size,
        "h": config.head_dim,
    }
    projection = pooled_projection(name)
    if projection is not None:
        sizes["p"] = heads_per_layer(config, projection)
    return tuple(sizes[axis] for axis in axes(name) if axis != "l")


def stored_shape(config: LlamaConfig, name: str, sharing: SharingMap | None = None) -> tuple[int, ...]:
    """Shape of a parameter as a model holds it: layers stacked, pools with one row per stored head."""
    shape = slice_shape(config, name)
    projection = pooled_projection(name)
    if projection is not None:
        return (pool_rows(config, projection, sharing), *shape[1:])
    return (config.num_layers, *shape) if is_layered(name) else shape


def pool_rows(config: LlamaConfig, projection: str, sharing: SharingMap | None = None) -> int:
    """P: number of stored heads of one projection."""
    if sharing is None:
        return config.num_layers * heads_per_layer(config, projection)
    return len(sharing.stored_slots(projection))


def index_name(projection: str) -> str:
    """Attribute that holds a projection's head index, e.g. `q_index_ln`."""
    return f"{projection}_index_l{'n' if projection in 'qo' else 'k'}"


def pool_index(config: LlamaConfig, projection: str, sharing: SharingMap | None = None) -> np.ndarray:
    """Pool row of every head, int32 [L, N] for q and o, [L, K] for k and v; the identity for a dense model.

    A dropped head's is P, one past the last row.
    """
    if sharing is not None:
        return sharing.pool_index(projection)
    heads = heads_per_layer(config, projection)
    return np.arange(config.num_layers * heads, dtype=np.int32).reshape(config.num_layers, heads)


def read_heads(
    source: WeightSource, name: str, layer: int, read_rows: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """One layer's heads of a stored pool, as `WeightSource.read` gives them.

    Args:
      source: what the pool belongs to.
      name: a pooled parameter.
      layer: the layer.
      read_rows: gives the pool's rows at some indices, int32 [n], at least one.
    """
    projection = pooled_projection(name)
    assert projection is not None
    index = pool_index(source.config, projection, source.sharing)[layer]
    kept = index < pool_rows(source.config, projection, source.sharing)
    if kept.all():
        return read_rows(index)
    heads = np.zeros(slice_shape(source.config, name), source.dtype(name))
    if kept.any():
        heads[kept] = read_rows(index[kept])
    return heads


def assemble(source: WeightSource, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
    """A whole parameter of a source as a model stores it, or a part of it, built layer by layer.

    Peak memory is what is returned plus one layer's slice of the parameter. What is built from layers is aligned, so
    that a CPU's JAX can take it without a copy (`jax.device_put`).

    Args:
      source: the weights.
      name: a parameter.
      part: slices of the stored parameter's axes; layers and pool rows are never cut, only the axes after them.
    """
    config = source.config
    if not is_layered(name):
        return source.read(name)[part]
    inner = part[1:]
    shape = (stored_shape(config, name, source.sharing)[0], *_cut(slice_shape(config, name), name, inner))
    value = _aligned(shape, source.dtype(name))
    start = 0
    for layer in range(config.num_layers):
        rows = source.read(name, layer)
        if pooled_projection(name) is None:
            value[layer] = rows[inner]
            continue
        kept = list(_kept_heads(config, name, layer, source.sharing))
        value[start : start + len(kept)] = rows[kept][(slice(None), *inner)]
        start += len(kept)
    return value


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array, not filled, that begins at a multiple of `ALIGNMENT` bytes."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _cut(shape: tuple[int, ...], name: str, inner: tuple[slice, ...]) -> tuple[int, ...]:
    """Shape of what `inner` leaves of a slice's axes behind the leading one of the stored parameter."""
    behind = shape if pooled_projection(name) is None else shape[1:]
    cuts = (*inner, *[slice(None)] * (len(behind) - len(inner)))
    return tuple(len(range(size)[cut]) for size, cut in zip(behind, cuts, strict=True))


def fingerprint(source: WeightSource) -> str:
    """SHA-256 over checksums of the attention weights as float32, whatever the format or storage dtype.

    16-bit weights and their exact float32 copies have the same fingerprint; a receiver counts as holding its donor's
    weights. The checksums tell weights apart that differ by training or by accident, not ones made to collide. The
    four projections of a layer are in memory at a time.
    """
    digest = hashlib.sha256()
    for part in _layer_checksums(source, [pool_name(projection) for projection in PROJECTIONS]):
        digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def whole_fingerprint(source: WeightSource) -> str:
    """As `fingerprint`, but of the architecture and all weights; one layer's are in memory at a time."""
    names = parameter_names(source.config)
    digest = hashlib.sha256(json.dumps(source.config.to_json(), sort_keys=True).encode())
    for name in names:
        if not is_layered(name):
            digest.update(_checksums(source.read(name)))
    for part in _layer_checksums(source, [name for name in names if is_layered(name)]):
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


def _kept_heads(config: LlamaConfig, name: str, layer: int, sharing: SharingMap | None) -> Iterator[int]:
    projection = pooled_projection(name)
    assert projection in PROJECTIONS
    heads = heads_per_layer(config, projection)
    if sharing is None:
        yield from range(heads)
        return
    own = sharing.owns_weights(projection)
    yield from (head for head in range(heads) if own[layer, head])
