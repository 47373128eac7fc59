"""Functional matching: how much of a layer's attention is lost when a unit runs on another unit's weights.

A unit J = G * H features wide is replaced by what a donor's q, k and v give on the receiver's own input, and the output
projection is refitted. What then is left of the error is the score, and a sum of products tells it for all pairs.
"""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from headshare_jax.calibration import (
    BLOCKS,
    advance,
    attention_input,
    batches,
    embedded,
    head_outputs,
    layer_weights,
    on_disk,
    output_weight,
    residual_weights,
)
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import WeightSource, fingerprint
from headshare_jax.similarity import MatchResult

Weights = dict[str, jax.Array]
# Float64 sums over tokens: the layer's own features [I, I], those with each donor's [C, I, J], each donor's [C, J, J].
Sums = tuple[np.ndarray, np.ndarray, np.ndarray]


def match_functional(
    source: WeightSource,
    windows_wt: np.ndarray,
    *,
    span: int = 5,
    same_layer: bool = False,
    ridge: float = 1e-2,
    prefilter: int = 4,
    keep: int = 3,
    batch_tokens: int = 2048,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MatchResult:
    """Scores the units of the nearest earlier layers as donors of every unit, by what they compute on a text.

    The score of a pair is minus the root mean square over tokens of the change of the residual stream, relative to its
    norm, that sharing q, k and v makes after the refit of the layer's output projection: 0 where donor and receiver do
    the same. Scores hold for one receiver in a layer, and for donors that keep their weights: choose with
    `sharing_map(..., chains="forbid")`.

    Args:
      source: a dense model, or an opened checkpoint.
      windows_wt: int32 [W, T], the calibration text.
      span: number of earlier layers whose units are tried.
      same_layer: try the other units of the receiver's own layer too.
      ridge: lambda of the refit, above 0.
      prefilter: windows on which all donors are tried; the others see only the best.
      keep: how many of the best donors of each unit stay for the other windows.
      batch_tokens: tokens run at a time.
      progress: called with the layers done and in all.

    Returns:
      All scores that are known; -inf for the other pairs.

    Raises:
      HeadshareError: fewer than two layers, or an impossible setting.
    """
    config = source.config
    if config.num_layers < 2:
        raise HeadshareError("Matching needs at least two layers: donors come from earlier layers.")
    if min(span, prefilter, keep, batch_tokens) < 1 or not 0 < ridge < np.inf:
        raise HeadshareError("span, prefilter, keep and batch_tokens must be at least 1, and the ridge above 0.")
    units, (windows, seq_len) = config.num_kv_heads, windows_wt.shape
    first = slice(0, min(prefilter, windows))
    rest = slice(first.stop, windows)
    scores = np.full((config.num_units, config.num_units), -np.inf, np.float32)
    near: dict[int, Weights] = {}
    with on_disk(embedded(source, windows_wt)) as x_wtd:
        for layer in range(config.num_layers):
            weights = layer_weights(source, layer)
            near = {below: near[below] for below in range(max(0, layer - span), layer)} | {layer: weights}
            tried = np.arange(min(near) * units, (layer + same_layer) * units)
            if len(tried):
                parts = [list(batches(some, batch_tokens, seq_len)) for some in (first, rest)]
                o_id = np.asarray(output_weight(weights, "attention"), np.float64)
                sums = _sums(config, weights, _units(near, tried, units), x_wtd, parts[0])
                if parts[1]:
                    kept = _promising(pair_residuals(*sums, o_id, ridge), keep * units)
                    tried, sums = tried[kept], (sums[0], sums[1][kept], sums[2][kept])
                    more = _sums(config, weights, _units(near, tried, units), x_wtd, parts[1])
                    sums = sums[0] + more[0], sums[1] + more[1], sums[2] + more[2]
                own = np.arange(layer * units, (layer + 1) * units)
                scores[np.ix_(own, tried)] = -np.sqrt(pair_residuals(*sums, o_id, ridge) / windows_wt.size)
                scores[own, own] = -np.inf
            for part in batches(slice(0, windows), batch_tokens, seq_len):
                for block in BLOCKS:
                    x_wtd[part] = advance(config, weights, x_wtd[part], block)
            progress(layer + 1, config.num_layers)
    return _result(scores, config, fingerprint(source))


def pair_residuals(gram: np.ndarray, cross: np.ndarray, own: np.ndarray, o_id: np.ndarray, ridge: float) -> np.ndarray:
    """Squared error, ridge term included, left by every pair of a unit of a layer and a donor; float64 [U, C].

    With rho = ridge * mean(diag(gram)), the least value over W of ||H' W - H W_0||^2 + rho ||W - W_0||^2, H' being H
    with a unit's features replaced by the donor's. Let P = (gram + rho)^-1, the only factorisation of the layer's size,
    Z = P cross, T = own - cross^T Z, and N = P_aa^-1 for the rows a of the unit. Eliminating the other rows leaves

        trace(W_a^T (N - Y^T S^-1 Y) W_a),  Y = Z_a^T N + rho,  S = T + rho + Z_a^T N Z_a,

    so that a pair costs one system of its own J features.

    Args:
      gram: float64 [I, I], H^T H.
      cross: float64 [C, I, J], H^T G of every donor's features G.
      own: float64 [C, J, J], G^T G.
      o_id: float64 [I, D], W_0.
      ridge: above 0.
    """
    width, size = len(gram), own.shape[-1]
    rho = ridge * max(np.trace(gram) / width, np.finfo(np.float32).tiny)
    inverse = linalg.inv(gram + rho * np.eye(width))
    z_cij = inverse @ cross
    t_cjj = own - np.swapaxes(cross, 1, 2) @ z_cij + rho * np.eye(size)
    residual_uc = np.empty((width // size, len(cross)))
    for unit in range(width // size):
        rows = slice(unit * size, (unit + 1) * size)
        n_jj = linalg.inv(inverse[rows, rows])
        outer_jj = o_id[rows] @ o_id[rows].T
        for donor in range(len(cross)):
            z_jj = z_cij[donor, rows]
            y_jj = z_jj.T @ n_jj + rho * np.eye(size)
            s_jj = t_cjj[donor] + z_jj.T @ n_jj @ z_jj
            left_jj = n_jj - y_jj.T @ linalg.cho_solve(linalg.cho_factor(s_jj), y_jj)
            residual_uc[unit, donor] = max(np.sum(left_jj * outer_jj), 0.0)
    return residual_uc


def _sums(config: LlamaConfig, weights: Weights, donors: Weights, x_wtd: np.ndarray, parts: Iterable[slice]) -> Sums:
    """Sums over some windows of a layer's input."""
    units, own = len(donors["k_pool_pdh"]), weights["o_pool_phd"]
    size = len(own) // len(weights["k_pool_pdh"]) * own.shape[1]
    width = len(own) * own.shape[1]
    total = (np.zeros((width, width)), np.zeros((units, width, size)), np.zeros((units, size, size)))
    for part in parts:
        for sums, more in zip(total, _products(config, weights, donors, x_wtd[part]), strict=True):
            sums += np.asarray(more, np.float64)
    return total


@partial(jax.jit, static_argnames="config")
def _products(
    config: LlamaConfig, weights: Weights, donors: Weights, x_btd: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Sums` of a batch, float32, weighted as a refit weights tokens."""
    with jax.default_matmul_precision("highest"):
        normed_btd = attention_input(config, weights, x_btd)
        w_m1 = residual_weights(advance(config, weights, x_btd, "attention")).reshape(-1, 1)
        h_mi = w_m1 * head_outputs(config, weights, normed_btd).reshape(len(w_m1), -1)
        g_mcj = w_m1[..., None] * head_outputs(config, donors, normed_btd).reshape(
            len(w_m1), donors["k_pool_pdh"].shape[0], -1
        )
        cross_cij = jnp.einsum("mi,mcj->cij", h_mi, g_mcj)
        return h_mi.T @ h_mi, cross_cij, jnp.einsum("mci,mcj->cij", g_mcj, g_mcj)


def _units(layers: dict[int, Weights], units: np.ndarray, per_layer: int) -> Weights:
    """q, k and v of units, by flat index, side by side as if they were one layer's."""
    places = [divmod(int(unit), per_layer) for unit in units]
    names = [name for name in next(iter(layers.values())) if name[:2] in ("q_", "k_", "v_")]
    return {
        name: jnp.concatenate(
            [layers[layer][name].reshape(per_layer, -1, *layers[layer][name].shape[1:])[unit] for layer, unit in places]
        )
        for name in names
    }


def _promising(residual_uc: np.ndarray, count: int) -> np.ndarray:
    """The donors that rank highest for any unit, ascending: a fixed number, so that all layers compile once."""
    rank_uc = np.argsort(np.argsort(residual_uc, axis=1, kind="stable"), axis=1, kind="stable")
    return np.sort(np.argsort(rank_uc.min(axis=0), kind="stable")[:count])


def _result(scores: np.ndarray, config: LlamaConfig, source: str) -> MatchResult:
    units, shape = config.num_kv_heads, (config.num_layers, config.num_kv_heads)
    best = np.argmax(scores, axis=1)
    value = np.take_along_axis(scores, best[:, None], axis=1)[:, 0].astype(np.float64)
    found = np.isfinite(value)
    return MatchResult(
        donor_layer=np.where(found, best // units, -1).astype(np.int32).reshape(shape),
        donor_unit=np.where(found, best % units, -1).astype(np.int32).reshape(shape),
        value=value.reshape(shape),
        match="functional",
        heads_per_unit=config.heads_per_unit,
        scores=scores,
        source=source,
    )
