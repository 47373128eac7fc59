"""What it costs to keep less of a unit, from the outputs of its heads and the gradients of predictions.

For a small change d of attention's output, half the mean of (g d)^2 is how far predictions move, in nats per token.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration import streams
from headshare_jax.calibration.fisher import LayerBack, layer_backward, layer_room, layers_backward
from headshare_jax.calibration.streams import Weights
from headshare_jax.config import LlamaConfig
from headshare_jax.cores import on_cores
from headshare_jax.model.mesh import replicated, rows_of
from headshare_jax.sharing import finite
from headshare_jax.sharing.source import WeightSource
from headshare_jax.slim.choose import Costs
from headshare_jax.slim.cut import Directions
from headshare_jax.slim.kept import Kept

# Of the largest second moment of a head's outputs; smaller ones are taken for it, so that they can be divided by.
_LEAST_MOMENT = 1e-6


class Told(NamedTuple):
    """What a batch tells of a layer's units.

    Attributes:
      outputs_btnh, gradients_btnh: of its heads, and by them, [B, T, N, H].
      sums: over tokens, moments [U, H, H] of outputs and of gradients by them, and [U, P, P] of what pairs tell.
    """

    outputs_btnh: jax.Array
    gradients_btnh: jax.Array
    sums: tuple[jax.Array, jax.Array, jax.Array]


def measure(
    source: WeightSource,
    kept: Kept,
    windows_wt: np.ndarray,
    *,
    states_lwtd: np.ndarray | None = None,
    known: bool = False,
    batch_tokens: int = 2048,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Costs, list[Directions]]:
    """Costs of keeping less of every unit, and the directions in which its values are cut.

    Args:
      source: the model so far, written out at full width.
      kept: what is left of it.
      windows_wt: int32 [W, T], text.
      states_lwtd: room as of `fisher.layer_room`; made here by default.
      known: what every layer reads, and what the last gives, is there already.
      batch_tokens: tokens run at a time on a device.
      seed: of the tokens drawn for gradients.
      mesh: devices of this process; by default all.
      progress: called with the layers done, forward and backward, and in all.

    Returns:
      The costs, and the directions of every layer, the first layer first.

    Raises:
      HeadshareError: the disk is full, or the model computes NaN or infinities.
    """
    mesh, config = mesh or streams.calibration_mesh(), source.config
    parts = streams.batches(slice(0, len(windows_wt)), batch_tokens, windows_wt.shape[1], rows_of(mesh))
    with layer_room(config, windows_wt) if states_lwtd is None else nullcontext(states_lwtd) as room_lwtd:
        layers = layers_backward(
            source, windows_wt, parts, room_lwtd, mesh, _moments, known=known, seed=seed, progress=progress
        )
        found = [_layer_costs(config, each, kept.rank[each.layer], windows_wt.size) for each in layers]
    values, pairs, directions = zip(*reversed(found), strict=True)
    return Costs(np.stack(values), None if config.qk_norm else np.stack(pairs)), list(directions)


def _layer_costs(
    config: LlamaConfig, layer: LayerBack[Told], rank_u: np.ndarray, tokens: int
) -> tuple[np.ndarray, np.ndarray, Directions]:
    """Costs of a layer's values, [U, H + 1], and of its pairs, [U, P, P]; and its directions."""
    mesh = layer.before.mesh

    def means(*sums: jax.Array) -> np.ndarray:
        total: np.ndarray = np.sum([np.asarray(each, np.float64) for each in sums], axis=0) / tokens
        finite.check_computed(f"Costs of the units of layer {layer.layer}", total)
        return total

    z_uhh, w_uhh, pairs_upp = (means(*each) for each in zip(*(told.sums for told in layer.wanted), strict=True))
    directions = layer_directions(z_uhh, w_uhh, rank_u)
    coordinates = [jnp.asarray(each, jnp.float32) for each in (directions.into_uhh, directions.back_uhh)]
    values_uh = means(*(_tails(config, told, *coordinates, mesh) for told in layer.wanted))
    return np.pad(values_uh, ((0, 0), (0, 1))) / 2, pairs_upp / 2, directions


def layer_directions(z_uhh: np.ndarray, w_uhh: np.ndarray, rank_u: np.ndarray) -> Directions:
    """Those of a layer's units, of which so many columns are left, from their second moments."""
    each = on_cores(lambda unit: _unit_directions(z_uhh[unit], w_uhh[unit], int(rank_u[unit])), range(len(rank_u)))
    return Directions(np.stack([into for into, _ in each]), np.stack([back for _, back in each]))


def _unit_directions(z_hh: np.ndarray, w_hh: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A unit's `Directions`, from second moments of its heads' outputs and of the gradients by these.

    With C and K the two, C^1/2 K C^1/2 has the left singular vectors of C^1/2 [W_o1 ... W_oG] G^1/2, G being the second
    moment of the gradient at attention's output.
    """
    width = len(z_hh)
    square_r, vectors_rr = np.linalg.eigh(z_hh[:rank, :rank])
    largest = square_r.max(initial=0)
    root_r = np.sqrt(np.maximum(square_r, _LEAST_MOMENT * largest)) if largest > 0 else np.ones(rank)
    root_rr, inverse_rr = (vectors_rr * root_r) @ vectors_rr.T, (vectors_rr / root_r) @ vectors_rr.T
    _, order_rr = np.linalg.eigh(root_rr @ w_hh[:rank, :rank] @ root_rr)
    order_rr = order_rr[:, ::-1]
    room = (0, width - rank)
    return np.pad(inverse_rr @ order_rr, (room, room)), np.pad(order_rr.T @ root_rr, (room, room))


@partial(jax.jit, static_argnames=("config", "mesh"))
def _moments(
    config: LlamaConfig, weights: Weights, x_btd: jax.Array, gradient_btd: jax.Array, there_b: jax.Array, mesh: Mesh
) -> tuple[jax.Array, Told]:
    """A `fisher.Backward`: the gradient before a layer, and what is told on the way."""
    with jax.default_matmul_precision("highest"):
        before_btd, _, heads = layer_backward(config, weights, x_btd, gradient_btd, mesh)
        z_btnh = heads.outputs_btnh * there_b[:, None, None, None]
        z_mugh = _by_unit(config, z_btnh)
        w_mugh = _by_unit(config, heads.gradients_btnh)
        told_muh = jnp.sum(_by_unit(config, heads.queries_btnh * heads.by_queries_btnh), axis=2)
        half = config.rotary_dim // 2
        told_mup = jnp.concatenate(
            [told_muh[..., :half] + told_muh[..., half : 2 * half], told_muh[..., 2 * half :]], axis=-1
        )
        sums = (
            jnp.einsum("mugh,mugj->uhj", z_mugh, z_mugh),
            jnp.einsum("mugh,mugj->uhj", w_mugh, w_mugh),
            jnp.einsum("mup,mur->upr", told_mup, told_mup),
        )
        sums = jax.lax.with_sharding_constraint(sums, replicated(mesh))
        before_btd, z_btnh, w_btnh = (
            streams.on_rows(each, mesh) for each in (before_btd, z_btnh, heads.gradients_btnh)
        )
        return before_btd, Told(z_btnh, w_btnh, sums)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _tails(config: LlamaConfig, told: Told, into_uhh: jax.Array, back_uhh: jax.Array, mesh: Mesh) -> jax.Array:
    """Sums over tokens, [U, H], of the squares of what the directions from each on tell together."""
    with jax.default_matmul_precision("highest"):
        z_mugi = jnp.einsum("mugh,uhi->mugi", _by_unit(config, told.outputs_btnh), into_uhh)
        w_mugi = jnp.einsum("mugh,uih->mugi", _by_unit(config, told.gradients_btnh), back_uhh)
        told_mui = jnp.sum(z_mugi * w_mugi, axis=2)
        tail_mui = jnp.flip(jnp.cumsum(jnp.flip(told_mui, axis=-1), axis=-1), axis=-1)
        return jax.lax.with_sharding_constraint(jnp.sum(jnp.square(tail_mui), axis=0), replicated(mesh))


def _by_unit(config: LlamaConfig, heads_btnh: jax.Array) -> jax.Array:
    """Heads of all tokens, unit by unit, [M, U, G, H]."""
    return heads_btnh.reshape(-1, config.num_kv_heads, config.heads_per_unit, config.head_dim)
