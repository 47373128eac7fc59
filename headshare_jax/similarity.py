"""Match scores between all pairs of sharing units, from one blocked Gram matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import WeightSource, fingerprint

MATCH_FUNCTIONS = ("q", "k", "v", "qk", "qkv", "total", "random")
# Two blocks of layers are in memory at a time: the rows and the columns of a block of the Gram matrix.
BLOCK_BYTES = 512 * 2**20
CHUNK = 2048


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
        scores = cosine_scores(read, config.num_layers, units, block_bytes=block_bytes, progress=progress)
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
    read: Callable[[int], np.ndarray],
    num_layers: int,
    units: int,
    *,
    block_bytes: int = BLOCK_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Cosines between the units of all layers, float32 [L * U, L * U]; zero where the column's block is later.

    Args:
      read: gives one layer's features, float32 [U, dim].
      num_layers, units: L and U.
      block_bytes: bytes of features in one block of layers.
      progress: called with the block products done and in all.
    """
    layer_bytes = read(0).nbytes
    block = max(1, min(num_layers, block_bytes // layer_bytes))
    starts = range(0, num_layers, block)
    total, done = len(starts) * (len(starts) + 1) // 2, 0
    gram = np.zeros((num_layers * units, num_layers * units), np.float32)

    def features(start: int) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(read(layer)) for layer in range(start, min(start + block, num_layers)))

    for row in starts:
        rows = features(row)
        for column in starts[: row // block + 1]:
            columns = rows if column == row else features(column)
            product = np.asarray(_products(rows, columns))
            top, left = row * units, column * units
            gram[top : top + product.shape[0], left : left + product.shape[1]] = product
            done += 1
            progress(done, total)
    norm = np.sqrt(np.diag(gram))
    return gram / np.maximum(norm[:, None] * norm[None, :], np.finfo(np.float32).tiny)


@jax.jit
def _products(rows: tuple[jax.Array, ...], columns: tuple[jax.Array, ...]) -> jax.Array:
    """Inner products of all units of two blocks of layers [U, dim], float32 [layers * U, layers * U].

    The feature axis is cut into chunks small enough for all units' share of one to stay in a core's cache.
    """
    dim = rows[0].shape[1]
    chunk = min(CHUNK, dim)

    def product(start: jax.Array | int, size: int) -> jax.Array:
        a, b = (
            jnp.concatenate([jax.lax.dynamic_slice_in_dim(layer, start, size, axis=1) for layer in block])
            for block in (rows, columns)
        )
        return jnp.einsum("ai,bi->ab", a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    whole = dim // chunk
    rest = product(whole * chunk, dim - whole * chunk) if dim % chunk else jnp.zeros((), jnp.float32)
    first = product(0, chunk) + rest
    return jax.lax.fori_loop(1, whole, lambda place, total: total + product(place * chunk, chunk), first)


def _read_features(source: WeightSource, match: str, layer: int) -> np.ndarray:
    """One layer's features, float32 [U, dim]."""
    units = source.config.num_kv_heads
    weights = [source.read(f"{letter}_pool_pdh", layer) for letter in ("qkv" if match == "total" else match)]
    if match == "total":
        q_ndh, k_kdh, v_kdh = (jnp.asarray(value, jnp.float32) for value in weights)
        return np.asarray(_total(q_ndh, k_kdh, v_kdh)).reshape(units, -1)
    return np.concatenate([value.reshape(units, -1) for value in weights], axis=1, dtype=np.float32)


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
