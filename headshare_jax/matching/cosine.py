"""Match scores between all pairs of sharing units, from one blocked Gram matrix."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PROJECTIONS, pool_name, slice_shape
from headshare_jax.sharing import finite
from headshare_jax.sharing.scores import MatchResult, best_donors
from headshare_jax.sharing.source import WeightSource, fingerprint
from headshare_jax.typed import typed

# One layer's features: arrays [U, ...].
Parts = Sequence[np.ndarray]

MATCH_FUNCTIONS = ("q", "k", "v", "qk", "qkv", "total", "random")
# Of one block of layers; two are in memory at a time, the rows and the columns of a block of the Gram matrix.
BLOCK_BYTES = 2**30
# Of what a core multiplies at a time.
CHUNK_BYTES = 4 * 2**20
# Of one product. With AVX-512, OpenBLAS multiplies tiles of up to 32 rows and a million multiply-adds where they lie;
# larger ones it first copies into an order of its own, which takes long beside a product of so few rows.
TILE_UNITS, TILE_FEATURES = 32, 512


@typed
def match(
    source: WeightSource,
    function: str = "qk",
    *,
    match: str | None = None,
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
      function: one of `MATCH_FUNCTIONS`.
      match: the old name of `function`.
      seed: of `random`.
      block_bytes: bytes of one block of layers; at least one layer is held.
      progress: called with the block products done and in all.

    Raises:
      HeadshareError: unknown match function, fewer than two layers, or a negative seed.

    Examples:
      >>> result = hs.match(model, "qk")
      >>> result.donor_layer[0], result.value.shape
      (array([-1, -1], dtype=int32), (3, 2))
    """
    if match is not None:
        warnings.warn("match(match=...) is now match(function=...).", DeprecationWarning, stacklevel=2)
        function = match
    if function not in MATCH_FUNCTIONS:
        raise HeadshareError(f"The match function {function!r} is not one of {', '.join(MATCH_FUNCTIONS)}.")
    config = source.config
    if config.num_layers < 2:
        raise HeadshareError("Matching needs at least two layers: donors come from earlier layers.")
    units = config.num_kv_heads
    if function == "random":
        if seed < 0:
            raise HeadshareError(f"The seed must not be negative, but is {seed}.")
        scores = np.random.default_rng(seed).random((config.num_units, config.num_units), np.float32)
    else:
        read, dim = partial(_read_features, source, function), _feature_dim(config, function)
        scores = cosine_scores(read, config.num_layers, units, dim, block_bytes=block_bytes, progress=progress)
    layer = np.repeat(np.arange(config.num_layers), units)
    scores = np.where(layer[:, None] > layer[None, :], scores, -np.inf).astype(np.float32)
    return MatchResult(
        *best_donors(scores, units),
        match=function,
        heads_per_unit=config.heads_per_unit,
        scores=scores,
        seed=seed if function == "random" else None,
        source=fingerprint(source),
    )


def magnitudes(source: WeightSource, *, progress: Callable[[int, int], None] = lambda done, total: None) -> MatchResult:
    """Scores dropping every unit by minus the L2 norm of its q, k, v and o weights: a baseline. No pair is scored."""
    config = source.config
    shape = (config.num_layers, config.num_kv_heads)
    norms = np.zeros(shape, np.float32)
    for layer in range(config.num_layers):
        weights = [source.read(pool_name(projection), layer) for projection in PROJECTIONS]
        with np.errstate(over="ignore"):
            squares = [np.square(np.asarray(value, np.float32)).reshape(shape[1], -1).sum(axis=1) for value in weights]
        norms[layer] = np.sqrt(np.sum(squares, axis=0))
        _check_squares(layer, norms[layer])
        progress(layer + 1, config.num_layers)
    nobody = np.full(shape, -1, np.int32)
    return MatchResult(
        donor_layer=nobody,
        donor_unit=nobody,
        value=np.full(shape, -np.inf),
        match="magnitude",
        heads_per_unit=config.heads_per_unit,
        drop_score=-norms,
        source=fingerprint(source),
    )


def cosine_scores(
    read: Callable[[int], Parts],
    num_layers: int,
    units: int,
    dim: int,
    *,
    block_bytes: int = BLOCK_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Cosines of all units with those of earlier layers, float32 [L * U, L * U]; what else is there means nothing.

    Args:
      read: gives one layer's features in parts [U, ..., X, Y] of any float type; all parts have the same X and Y.
      num_layers, units, dim: L, U, and the number of features of a unit, in all parts together.
      block_bytes: bytes of features, as float32, in one block of layers.
      progress: called with the block products done and in all.
    """
    block = max(1, min(num_layers, block_bytes // (4 * units * dim)))
    starts = range(0, num_layers, block)
    total, done = len(starts) * (len(starts) + 1) // 2, 0
    gram = np.zeros((num_layers * units, num_layers * units), np.float32)

    def read_block(start: int) -> list[Parts]:
        return [read(layer) for layer in range(start, min(start + block, num_layers))]

    columns: list[Parts] = []
    for row in starts:
        rows = read_block(row)
        within = slice(row * units, (row + len(rows)) * units)
        gram[within, within] = _products(rows)
        progress(done := done + 1, total)
        for column in reversed(starts[: row // block]):
            # The block before the rows is still held, so it is not read again.
            if column != row - block:
                columns.clear()
                columns += read_block(column)
            gram[within, column * units : (column + len(columns)) * units] = _products(rows, columns)
            progress(done := done + 1, total)
        columns = rows
    for layer, squares in enumerate(np.diagonal(gram).reshape(-1, units)):
        _check_squares(layer, squares)
    norm = np.sqrt(np.diagonal(gram))
    return gram / np.maximum(norm[:, None] * norm[None, :], np.finfo(np.float32).tiny)


def _check_squares(layer: int, squares: np.ndarray) -> None:
    finite.check_computed(f"Sums of squares of the heads' weights in layer {layer}", squares)


def _products(rows: list[Parts], columns: list[Parts] | None = None) -> np.ndarray:
    """Inner products, float32 [R, C], of the units of some layers with those of others.

    Without columns, of units with those of earlier layers and with themselves; what else is there means nothing.
    Every core works on chunks of the features that stay in its cache, cut into tiles.
    """
    blocks = [[_flat(parts) for parts in block] for block in (rows, columns) if block]
    units = len(rows[0][0])
    heights = [math.ceil(len(block) * units / TILE_UNITS) for block in blocks]
    depth = max(1, CHUNK_BYTES // (4 * sum(heights) * TILE_UNITS * TILE_FEATURES))
    # A tile that lies within one layer has no pairs in itself.
    own = 0 if units % TILE_UNITS == 0 else 1

    def add_up(pieces: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        chunks = [np.zeros((depth, height, TILE_UNITS, TILE_FEATURES), np.float32) for height in heights]
        products = np.zeros((heights[0], heights[-1], TILE_UNITS, TILE_UNITS), np.float32)
        squares = np.zeros((heights[0], TILE_UNITS), np.float32)
        for part, start in pieces:
            for chunk, block in zip(chunks, blocks, strict=True):
                _fill(chunk, [parts[part][:, start : start + depth * TILE_FEATURES] for parts in block])
            with np.errstate(over="ignore", invalid="ignore"):
                for tile in range(heights[0]):
                    donors = chunks[1] if columns else chunks[0][:, : tile + own]
                    products[tile, : donors.shape[1]] += (chunks[0][:, tile, None] @ donors.mT).sum(axis=0)
                squares += np.vecdot(chunks[0], chunks[0]).sum(axis=0)
        return products, squares

    lengths = [features.shape[1] for features in blocks[0][0]]
    step = depth * TILE_FEATURES
    pieces = [(part, start) for part, length in enumerate(lengths) for start in range(0, length, step)]
    cores = os.cpu_count() or 1
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores) as threads:
        sums = list(threads.map(add_up, [pieces[core::cores] for core in range(cores)]))
    products, squares = (np.sum(values, axis=0) for values in zip(*sums, strict=True))
    products = products.swapaxes(1, 2).reshape(squares.size, -1)
    if not columns:
        np.fill_diagonal(products, squares)
    return products[: len(rows) * units, : len(columns or rows) * units]


def _flat(parts: Parts) -> list[np.ndarray]:
    """Parts [U, ..., X, Y] as [U, F] in the order of their memory, so that nothing is copied."""
    swap = parts[0].strides[-1] > parts[0].strides[-2]
    return [(part.swapaxes(-1, -2) if swap else part).reshape(len(part), -1) for part in parts]


def _fill(chunk: np.ndarray, layers: list[np.ndarray]) -> None:
    """Writes each layer's features [U, F] into a chunk [depth, height, TILE_UNITS, TILE_FEATURES], and zeros behind."""
    lines = chunk.reshape(len(chunk), -1, TILE_FEATURES)
    units, length = layers[0].shape
    whole, rest = divmod(length, TILE_FEATURES)
    for layer, features in enumerate(layers):
        line = lines[:, layer * units : (layer + 1) * units]
        line[:whole] = features[:, : length - rest].reshape(units, whole, TILE_FEATURES).swapaxes(0, 1)
        if rest:
            line[whole, :, :rest] = features[:, length - rest :]
            line[whole, :, rest:] = 0
    lines[whole + bool(rest) :] = 0


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
