"""Match scores between all pairs of sharing units, from one blocked Gram matrix."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import WeightSource, fingerprint, slice_shape

MATCH_FUNCTIONS = ("q", "k", "v", "qk", "qkv", "total", "random")
# Two blocks of layers are in memory at a time: the rows and the columns of a block of the Gram matrix.
BLOCK_BYTES = 512 * 2**20
# Of the rows of one chunk of a product: two such chunks and what the product makes of them fit in caches.
CHUNK_BYTES = 2 * 2**20


@dataclass(frozen=True)
class MatchResult:
    """The best donor of every unit.

    Attributes:
      donor_layer, donor_unit: int32 [L, U], place of the best donor among all units of earlier layers; -1 in layer 0.
      value: float64 [L, U], its score; -inf in layer 0.
      match: match function.
      heads_per_unit: G.
      scores: float32 [L * U, L * U], the score of every (receiver, donor) pair, -inf where the donor is not in an
        earlier layer; None where only the best donors are known.
      seed: of the random baseline.
      source: fingerprint of the attention weights.
    """

    donor_layer: np.ndarray
    donor_unit: np.ndarray
    value: np.ndarray
    match: str | None = None
    heads_per_unit: int = 1
    scores: np.ndarray | None = None
    seed: int | None = None
    source: str | None = None

    @property
    def donor(self) -> np.ndarray:
        """int64 [L, U], flat index of the best donor."""
        return self.donor_layer.astype(np.int64) * self.value.shape[1] + self.donor_unit

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Flat receiver, flat donor and score of every known pair."""
        if self.scores is not None:
            receivers, donors = np.nonzero(np.isfinite(self.scores))
            return receivers, donors, self.scores[receivers, donors]
        receivers = np.flatnonzero(np.isfinite(self.value))
        return receivers, self.donor.ravel()[receivers], self.value.ravel()[receivers]


def match(
    source: WeightSource,
    match: str = "qk",
    *,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MatchResult:
    """Scores every unit against all units of earlier layers and keeps the best (paper, section 3.1).

    The score is the cosine of the two units' flattened weights: `q`, `k`, `v`, their concatenations `qk` and `qkv`,
    or `total`, softmax(W_q W_k^T / sqrt(D)) W_v of every query head, weights taken as [H, D]. `random` draws all
    scores uniformly instead.

    Layers are read in blocks of at most `block_bytes` (float32); two blocks are in memory at a time. Products
    accumulate in float32.

    Args:
      source: a model, or an opened checkpoint.
      match: one of `MATCH_FUNCTIONS`.
      seed: of `random`.
      block_bytes: bytes of one block of layers; at least one layer is held.
      progress: called with the block products done and in all.

    Raises:
      HeadshareError: unknown match function, or fewer than two layers.
    """
    if match not in MATCH_FUNCTIONS:
        raise HeadshareError(f"The match function {match!r} is not one of {', '.join(MATCH_FUNCTIONS)}.")
    config = source.config
    if config.num_layers < 2:
        raise HeadshareError("Matching needs at least two layers: donors come from earlier layers.")
    units = config.num_kv_heads
    if match == "random":
        scores = _random_scores(config.num_units, seed)
    else:
        read = partial(_read_features, source, match)
        dim = _feature_dim(config, match)
        scores = cosine_scores(read, config.num_layers, units, dim, block_bytes=block_bytes, progress=progress)
    layer = np.repeat(np.arange(config.num_layers), units)
    scores = np.where(layer[:, None] > layer[None, :], scores, -np.inf).astype(np.float32)
    best = np.argmax(scores, axis=1)
    value = np.take_along_axis(scores, best[:, None], axis=1)[:, 0].astype(np.float64)
    first = layer == 0
    shape = (config.num_layers, units)
    return MatchResult(
        donor_layer=np.where(first, -1, best // units).astype(np.int32).reshape(shape),
        donor_unit=np.where(first, -1, best % units).astype(np.int32).reshape(shape),
        value=value.reshape(shape),
        match=match,
        heads_per_unit=config.heads_per_unit,
        scores=scores,
        seed=seed if match == "random" else None,
        source=fingerprint(source),
    )


def cosine_scores(
    read: Callable[[int], Sequence[np.ndarray]],
    num_layers: int,
    units: int,
    dim: int,
    *,
    block_bytes: int = BLOCK_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Cosines between the units of all layers, float32 [L * U, L * U]; zero where the column's block is later.

    Args:
      read: gives one layer's features in parts [U, ...] of any float type.
      num_layers, units, dim: L, U, and the number of features of a unit, in all parts together.
      block_bytes: bytes of features in one block of layers.
      progress: called with the block products done and in all.
    """
    block = max(1, min(num_layers, block_bytes // (4 * units * dim)))
    starts = range(0, num_layers, block)
    total, done = len(starts) * (len(starts) + 1) // 2, 0
    gram = np.zeros((num_layers * units, num_layers * units), np.float32)
    buffers = [_aligned_empty((block * units, dim)) for _ in range(2)]

    def features(buffer: np.ndarray, start: int) -> jax.Array:
        layers = range(start, min(start + block, num_layers))
        for place, layer in enumerate(layers):
            _fill(buffer[place * units : (place + 1) * units], read(layer))
        return jax.device_put(buffer[: len(layers) * units])

    previous = None
    for row in starts:
        # The rows before these stay in their buffer as the first columns, so they are not read again.
        buffers.reverse()
        rows = features(buffers[0], row)
        for column in reversed(starts[: row // block + 1]):
            if column == row:
                columns = rows
            elif column == row - block and previous is not None:
                columns = previous
            else:
                columns = features(buffers[1], column)
            # Waiting for the product here makes it safe to fill a buffer that jax uses in place.
            product = np.asarray(_products(rows, columns))
            top, left = row * units, column * units
            gram[top : top + product.shape[0], left : left + product.shape[1]] = product
            done += 1
            progress(done, total)
        previous = rows
    norm = np.sqrt(np.diag(gram))
    return gram / np.maximum(norm[:, None] * norm[None, :], np.finfo(np.float32).tiny)


def _aligned_empty(shape: tuple[int, int]) -> np.ndarray:
    """An uninitialised float32 array at a multiple of 64 bytes, which jax uses on a CPU without copying it."""
    size = shape[0] * shape[1]
    memory = np.empty(size + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + size].reshape(shape)


def _fill(features: np.ndarray, parts: Sequence[np.ndarray]) -> None:
    """Writes parts [U, ...] side by side into features [U, dim], in one pass even where a part is a transposed view."""
    start = 0
    for part in parts:
        stop = start + math.prod(part.shape[1:])
        features[:, start:stop].reshape(part.shape, copy=False)[...] = part
        start = stop


@jax.jit
def _products(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Inner products [R, C] of rows [R, dim] and columns [C, dim], float32.

    The feature axis is cut into chunks small enough for all rows' share of one to stay in a core's cache.
    """
    dim = rows.shape[1]
    chunk = min(dim, max(1, CHUNK_BYTES // (4 * 128 * rows.shape[0])) * 128)

    def product(start: jax.Array | int, size: int) -> jax.Array:
        a, b = (jax.lax.dynamic_slice_in_dim(block, start, size, axis=1) for block in (rows, columns))
        return jnp.einsum("ai,bi->ab", a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    whole = dim // chunk
    rest = product(whole * chunk, dim - whole * chunk) if dim % chunk else jnp.zeros((), jnp.float32)
    first = product(0, chunk) + rest
    return jax.lax.fori_loop(1, whole, lambda place, total: total + product(place * chunk, chunk), first)


def _feature_dim(config: LlamaConfig, match: str) -> int:
    """Number of features of a unit."""
    letters = "q" if match == "total" else match
    return sum(math.prod(slice_shape(config, f"{letter}_pool_pdh")) for letter in letters) // config.num_kv_heads


def _read_features(source: WeightSource, match: str, layer: int) -> list[np.ndarray]:
    """One layer's features in parts [U, ...]."""
    units = source.config.num_kv_heads
    weights = [source.read(f"{letter}_pool_pdh", layer) for letter in ("qkv" if match == "total" else match)]
    if match == "total":
        weights = [np.asarray(_total(*(jnp.asarray(value, jnp.float32) for value in weights)))]
    return [value.reshape(units, -1, *value.shape[1:]) for value in weights]


@jax.jit
def _total(q_ndh: jax.Array, k_kdh: jax.Array, v_kdh: jax.Array) -> jax.Array:
    """softmax(W_q W_k^T / sqrt(D)) W_v of every query head with weights as [H, D], float32 [N, D, H]."""
    width, group = q_ndh.shape[1], q_ndh.shape[0] // k_kdh.shape[0]
    k_ndh, v_ndh = (jnp.repeat(value, group, axis=0) for value in (k_kdh, v_kdh))
    logits_nhi = jnp.einsum("ndh,ndi->nhi", q_ndh, k_ndh, precision=jax.lax.Precision.HIGHEST)
    weights_nhi = jax.nn.softmax(logits_nhi / jnp.sqrt(jnp.float32(width)), axis=-1)
    return jnp.einsum("nhi,ndi->ndh", weights_nhi, v_ndh, precision=jax.lax.Precision.HIGHEST)


def _random_scores(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((size, size), np.float32)
