"""What it costs to keep less of a unit, from the outputs of its heads and the gradients of predictions.

For a small change d of attention's output, half the mean of (g d)^2 is how far predictions move, in nats per token.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration import streams
from headshare_jax.calibration.fisher import LayerGradients, layer_room, layers_backward
from headshare_jax.calibration.streams import Weights
from headshare_jax.config import LlamaConfig
from headshare_jax.model.attention import Window, attend
from headshare_jax.model.layer import head_outputs
from headshare_jax.model.mesh import replicated, rows_of
from headshare_jax.model.stacks import Held
from headshare_jax.parameters import pool_name
from headshare_jax.rope import rotary_angles
from headshare_jax.sharing import finite
from headshare_jax.sharing.source import WeightSource
from headshare_jax.slim.choose import Costs
from headshare_jax.slim.cut import Directions
from headshare_jax.slim.kept import Kept

# Of the largest second moment of a head's outputs; smaller ones are taken for it, so that they can be divided by.
_LEAST_MOMENT = 1e-6


def measure(
    source: WeightSource,
    kept: Kept,
    windows_wt: np.ndarray,
    *,
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
    with layer_room(config, windows_wt) as states_lwtd:
        layers = layers_backward(source, windows_wt, parts, states_lwtd, mesh, seed=seed, progress=progress)
        found = [_layer_costs(config, each, parts, kept.rank[each.layer], windows_wt.size) for each in layers]
    values, pairs, directions = zip(*reversed(found), strict=True)
    return Costs(np.stack(values), None if config.qk_norm else np.stack(pairs)), list(directions)


def _layer_costs(
    config: LlamaConfig, layer: LayerGradients, parts: list[slice], rank_u: np.ndarray, tokens: int
) -> tuple[np.ndarray, np.ndarray, Directions]:
    """Costs of a layer's values, [U, H + 1], and of its pairs, [U, P, P]; and its directions."""
    mesh = layer.before.mesh

    def means(program: Callable[..., tuple[jax.Array, ...]], *more: np.ndarray) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for part in parts:
            states = layer.before[part], layer.gradients[part], streams.there(part, mesh)
            sums = program(config, layer.weights, *states, *(jnp.asarray(each, jnp.float32) for each in more), mesh)
            told = [np.asarray(each, np.float64) / tokens for each in sums]
            found = [before + each for before, each in zip(found, told, strict=True)] if found else told
        finite.check_computed(f"Costs of the units of layer {layer.layer}", *found)
        return found

    z_uhh, w_uhh, pairs_upp = means(_moments)
    each = [_unit_directions(z_uhh[unit], w_uhh[unit], int(rank)) for unit, rank in enumerate(rank_u)]
    directions = Directions(np.stack([into for into, _ in each]), np.stack([back for _, back in each]))
    (values_uh,) = means(_tails, directions.into_uhh, directions.back_uhh)
    return np.pad(values_uh, ((0, 0), (0, 1))) / 2, pairs_upp / 2, directions


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
    config: LlamaConfig, weights: Weights, x_btd: jax.Array, g_btd: jax.Array, there_b: jax.Array, mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over tokens: moments [U, H, H] of outputs and of gradients by them, and [U, P, P] of what pairs tell."""
    with jax.default_matmul_precision("highest"):
        w_btnh = _wanted(weights, g_btd)

        def kept(
            q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, window: Window
        ) -> tuple[jax.Array, jax.Array]:
            z_btnh, back = jax.vjp(lambda q_btnh: attend(q_btnh, k_btkh, v_btkh, window=window), q_btnh)
            return z_btnh, q_btnh * back(w_btnh)[0]

        z_btnh, told_btnh = head_outputs(config, Held(weights), x_btd, _angles(config, x_btd), kept)
        z_mugh = _by_unit(config, z_btnh * there_b[:, None, None, None])
        w_mugh = _by_unit(config, w_btnh)
        told_muh, half = jnp.sum(_by_unit(config, told_btnh), axis=2), config.rotary_dim // 2
        told_mup = jnp.concatenate(
            [told_muh[..., :half] + told_muh[..., half : 2 * half], told_muh[..., 2 * half :]], axis=-1
        )
        sums = (
            jnp.einsum("mugh,mugj->uhj", z_mugh, z_mugh),
            jnp.einsum("mugh,mugj->uhj", w_mugh, w_mugh),
            jnp.einsum("mup,mur->upr", told_mup, told_mup),
        )
        return jax.lax.with_sharding_constraint(sums, replicated(mesh))


@partial(jax.jit, static_argnames=("config", "mesh"))
def _tails(
    config: LlamaConfig,
    weights: Weights,
    x_btd: jax.Array,
    g_btd: jax.Array,
    there_b: jax.Array,
    into_uhh: jax.Array,
    back_uhh: jax.Array,
    mesh: Mesh,
) -> tuple[jax.Array]:
    """Sums over tokens, [U, H], of the squares of what the directions from each on tell together."""
    with jax.default_matmul_precision("highest"):
        z_mugh = _by_unit(config, streams.window_heads(config, weights, x_btd) * there_b[:, None, None, None])
        w_mugh = _by_unit(config, _wanted(weights, g_btd))
        z_mugi = jnp.einsum("mugh,uhi->mugi", z_mugh, into_uhh)
        w_mugi = jnp.einsum("mugh,uih->mugi", w_mugh, back_uhh)
        told_mui = jnp.sum(z_mugi * w_mugi, axis=2)
        tail_mui = jnp.flip(jnp.cumsum(jnp.flip(told_mui, axis=-1), axis=-1), axis=-1)
        return jax.lax.with_sharding_constraint((jnp.sum(jnp.square(tail_mui), axis=0),), replicated(mesh))


def _wanted(weights: Weights, g_btd: jax.Array) -> jax.Array:
    """Gradients by head outputs, [B, T, N, H], from those by attention's output."""
    return jnp.einsum("btd,nhd->btnh", g_btd, weights[pool_name("o")])


def _by_unit(config: LlamaConfig, heads_btnh: jax.Array) -> jax.Array:
    """Heads of all tokens, unit by unit, [M, U, G, H]."""
    return heads_btnh.reshape(-1, config.num_kv_heads, config.heads_per_unit, config.head_dim)


def _angles(config: LlamaConfig, x_btd: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rotary_angles(config, jnp.arange(x_btd.shape[1], dtype=jnp.int32)[None])
