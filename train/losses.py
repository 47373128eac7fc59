"""PostShare's objective: next-token loss, similarity of the pairs, and distillation. Pure functions on arrays."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from headshare_jax.model.llama import Llama
from headshare_jax.output_head import head_logits
from headshare_jax.parameters import PROJECTIONS, pool_name
from headshare_jax.sharing.map import SharingMap

# Tokens on one device whose logits are in memory at a time.
HEAD_TOKENS = 512


def target_mask(segments_bt: jax.Array) -> jax.Array:
    """bool [B, T]: a next token is predicted at t, since t + 1 continues its document; segment 0 is padding."""
    continues_bt = (segments_bt[:, 1:] == segments_bt[:, :-1]) & (segments_bt[:, 1:] != 0)
    return jnp.pad(continues_bt, ((0, 0), (0, 1)))


def token_losses(
    model: Llama,
    tokens_bt: jax.Array,
    segments_bt: jax.Array,
    *,
    lm_weight: float | jax.Array = 1.0,
    z_weight: float = 0.0,
    teacher: Llama | None = None,
    distill_weight: float | jax.Array = 0.0,
    temperature: float = 1.0,
    parts: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Next-token loss and distillation, summed over the predicted tokens, in nats.

    Args:
      model: dense or shared.
      tokens_bt: int32 [B, T].
      segments_bt: int32 [B, T], document of every token; 0 is padding.
      lm_weight: of the next-token loss in the weighted sum.
      distill_weight: of the distillation.
      z_weight: of the squared log-partition in the next-token loss, which keeps logits from drifting.
      teacher: model to distil from, or None.
      temperature: divides both models' logits in the distillation.
      parts: equal parts of the batch that lie on different devices.

    Returns:
      The weighted sum, a float32 scalar; and its parts, float32 [2], through which no gradient flows: next-token loss
      (with the z term), and forward KL divergence from the teacher times temperature squared.
    """
    features_btd = model.features(tokens_bt, segments_bt=segments_bt)
    rows = [jnp.roll(tokens_bt, -1, axis=1), target_mask(segments_bt)]
    if teacher is not None:
        rows.append(teacher.features(tokens_bt, segments_bt=segments_bt))

    def chunk(head_vd: jax.Array, *chunk_rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        features_md, target_m, mask_m, *teacher_md = (row.reshape(-1, *row.shape[2:]) for row in chunk_rows)
        logits_mv = head_logits(features_md, head_vd)
        partition_m = jax.nn.logsumexp(logits_mv, axis=-1)
        chosen_m = jnp.take_along_axis(logits_mv, target_m[:, None], axis=-1)[:, 0]
        losses = [partition_m - chosen_m + z_weight * jnp.square(partition_m), jnp.zeros_like(partition_m)]
        if teacher is not None:
            losses[1] = temperature**2 * _forward_kl(teacher.logits(teacher_md[0]), logits_mv, temperature)
        sums = jnp.stack([jnp.sum(loss_m, where=mask_m) for loss_m in losses])
        return lm_weight * sums[0] + distill_weight * sums[1], sums

    chunked_features, *chunked_rows = (_chunked(row, parts) for row in (features_btd, *rows))
    return _sum_of_chunks(chunk, model.whole_head(), model.head_weights(), chunked_features, chunked_rows)


def similarity_penalty(params: Mapping[str, jax.Array], sharing: SharingMap, penalty: str = "norm") -> jax.Array:
    """How far the receivers of a map are from their donors, float32 scalar: mean over pairs, summed over projections.

    `norm` is the L2 norm of the difference of the flattened slices (paper, equation 5), `mse` its mean square; `kl`
    and `js` take the slices' softmax as distributions: KL(receiver || donor), and the Jensen-Shannon divergence.

    Args:
      params: a dense model's parameters, whose pools hold every head.
      sharing: the pairs, and the projections that are to be equal.
      penalty: one of `PENALTIES`.
    """
    total = jnp.zeros((), jnp.float32)
    for projection in tied_projections(sharing):
        receiver_rgdh, donor_rgdh = _pairs(params, sharing, projection, np.flatnonzero(sharing.tied(projection)))
        total += jnp.mean(PENALTIES[penalty](receiver_rgdh, donor_rgdh))
    return total


def tied_projections(sharing: SharingMap) -> tuple[str, ...]:
    """Projections that some receiver shares, in the order q, k, v, o."""
    return tuple(projection for projection in PROJECTIONS if sharing.tied(projection).any())


def pair_cosine(params: Mapping[str, jax.Array], sharing: SharingMap) -> jax.Array:
    """How alike the pairs of a map are: the mean cosine of a receiver's and its donor's slices, float32 scalar.

    Args:
      params: a dense model's pools, which hold every head.
      sharing: the pairs; a unit's slices of all projections that it shares are one vector.
    """
    receivers = sharing.receivers
    product_r = square_a_r = square_b_r = jnp.zeros(len(receivers), jnp.float32)
    for projection in tied_projections(sharing):
        tied_r = sharing.tied(projection).ravel()[receivers]
        a_rgdh, b_rgdh = _pairs(params, sharing, projection, receivers)
        product_r += jnp.where(tied_r, jnp.sum(a_rgdh * b_rgdh, axis=_SLICES), 0.0)
        square_a_r += jnp.where(tied_r, jnp.sum(jnp.square(a_rgdh), axis=_SLICES), 0.0)
        square_b_r += jnp.where(tied_r, jnp.sum(jnp.square(b_rgdh), axis=_SLICES), 0.0)
    lengths_r = jnp.sqrt(square_a_r) * jnp.sqrt(square_b_r)
    return jnp.mean(product_r / jnp.maximum(lengths_r, float(np.finfo(np.float32).tiny)))


# Axes of a unit's slices. They are never merged: a pool is cut along D, and merging would gather its parts.
_SLICES = (1, 2, 3)


def _pairs(
    params: Mapping[str, jax.Array], sharing: SharingMap, projection: str, receivers: np.ndarray
) -> Iterator[jax.Array]:
    """Slices of receivers, then of their donors, float32 [units, G, D, H], or [units, G, H, D] of o."""
    pool, group = params[pool_name(projection)], sharing.heads_per_unit if projection in "qo" else 1
    for units in (receivers, sharing.donor.ravel()[receivers]):
        slots = (units[:, None] * group + np.arange(group)).ravel()
        yield pool[slots].astype(jnp.float32).reshape(len(units), group, *pool.shape[1:])


def _norm(a_rgdh: jax.Array, b_rgdh: jax.Array) -> jax.Array:
    square_r = jnp.sum(jnp.square(a_rgdh - b_rgdh), axis=_SLICES)
    # The norm has no derivative where a pair is equal already; such a pair is to stay as it is.
    equal_r = square_r == 0
    return jnp.where(equal_r, 0.0, jnp.sqrt(jnp.where(equal_r, 1.0, square_r)))


def _mse(a_rgdh: jax.Array, b_rgdh: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(a_rgdh - b_rgdh), axis=_SLICES)


def _kl(a_rgdh: jax.Array, b_rgdh: jax.Array) -> jax.Array:
    log_a, log_b = (jax.nn.log_softmax(slices_rgdh, axis=_SLICES) for slices_rgdh in (a_rgdh, b_rgdh))
    return _divergence(log_a, log_b, _SLICES)


def _js(a_rgdh: jax.Array, b_rgdh: jax.Array) -> jax.Array:
    log_a, log_b = (jax.nn.log_softmax(slices_rgdh, axis=_SLICES) for slices_rgdh in (a_rgdh, b_rgdh))
    log_middle = jnp.logaddexp(log_a, log_b) - jnp.log(2.0)
    return 0.5 * (_divergence(log_a, log_middle, _SLICES) + _divergence(log_b, log_middle, _SLICES))


def _divergence(log_p: jax.Array, log_q: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=axes)


PENALTIES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"norm": _norm, "mse": _mse, "kl": _kl, "js": _js}


def _forward_kl(teacher_mv: jax.Array, student_mv: jax.Array, temperature: float) -> jax.Array:
    teacher_mv = jax.nn.log_softmax(teacher_mv / temperature)
    return _divergence(teacher_mv, jax.nn.log_softmax(student_mv / temperature), -1)


def _chunked(row_bt: jax.Array, parts: int) -> jax.Array:
    """[B, T, ...] as [chunks, parts, B / parts, positions, ...], T filled up with zeros (which the mask leaves out).

    Chunks are cut along T, so that every device has its share of each.
    """
    batch, length, *rest = row_bt.shape
    positions = max(1, HEAD_TOKENS * parts // batch)
    padded = jnp.pad(row_bt, [(0, 0), (0, -length % positions)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(padded.reshape(parts, batch // parts, -1, positions, *rest), 2, 0)


Sums = tuple[jax.Array, jax.Array]
Chunk = Callable[..., Sums]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_chunks(
    chunk: Chunk, whole: NamedSharding | None, head_vd: jax.Array, features: jax.Array, rows: list[jax.Array]
) -> Sums:
    """Sums of what `chunk(head_vd, features, *rows)` gives for every chunk: a value, and parts without gradient.

    Gradients for the head and the features are taken on the way forward, so that a chunk's logits are computed once
    and never kept. `whole` is where the head lies meanwhile.
    """
    return _sum_of_chunks_forward(chunk, whole, head_vd, features, rows)[0]


def _sum_of_chunks_forward(
    chunk: Chunk, whole: NamedSharding | None, head_vd: jax.Array, features: jax.Array, rows: list[jax.Array]
) -> tuple[Sums, Sums]:
    parts = features.shape[1]
    if whole is not None:
        # Gathered once, and not for every chunk.
        head_vd = jax.lax.with_sharding_constraint(head_vd, whole)
    gradient = jax.vmap(partial(jax.value_and_grad(chunk, argnums=(0, 1), has_aux=True), head_vd))

    # Parts are added up after the last chunk, so that devices speak once of the head's gradient.
    def add(total: tuple[Sums, jax.Array], rows: tuple[jax.Array, ...]) -> tuple[tuple[Sums, jax.Array], jax.Array]:
        sums, (head_gradient, features_gradient) = gradient(*rows)
        return jax.tree.map(jnp.add, total, (sums, head_gradient.astype(jnp.float32))), features_gradient

    nothing = ((jnp.zeros(parts), jnp.zeros((parts, 2))), jnp.zeros((parts, *head_vd.shape)))
    total, features_gradient = jax.lax.scan(add, nothing, (features, *rows))
    sums = jax.tree.map(lambda of_parts: jnp.sum(of_parts, axis=0), total[0])
    # In its own type before it is brought into another layout and summed, which takes a second array as large.
    head_gradient = jnp.sum(total[1].astype(head_vd.dtype), axis=0)
    # Summed over devices before the way back through the layers, during which each would else keep its own whole.
    head_gradient, features_gradient = jax.lax.optimization_barrier((head_gradient, features_gradient))
    return sums, (head_gradient, features_gradient)


def _sum_of_chunks_backward(
    chunk: Chunk, whole: NamedSharding | None, gradients: Sums, cotangents: Sums
) -> tuple[jax.Array, jax.Array, None]:
    head_gradient, features_gradient = (cotangents[0].astype(gradient.dtype) * gradient for gradient in gradients)
    return head_gradient, features_gradient, None


_sum_of_chunks.defvjp(_sum_of_chunks_forward, _sum_of_chunks_backward)
