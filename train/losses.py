"""PostShare's objective: next-token loss, similarity of the pairs, and distillation. Pure functions on arrays."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.modeling import Llama
from headshare_jax.sharing import SharingMap

PENALTIES = ("norm", "mse", "kl", "js")
# Tokens whose logits are in memory at a time; they are computed again in the backward pass.
HEAD_TOKENS = 512


def target_mask(segments_bt: jax.Array) -> jax.Array:
    """bool [B, T - 1]: token t + 1 is predicted, since it continues token t's document; segment 0 is padding."""
    return (segments_bt[:, 1:] == segments_bt[:, :-1]) & (segments_bt[:, 1:] != 0)


def next_token_loss(
    model: Llama,
    tokens_bt: jax.Array,
    segments_bt: jax.Array,
    *,
    z_weight: float = 0.0,
    teacher: Llama | None = None,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Sums over the predicted tokens, float32 scalars, in nats.

    Args:
      model: dense or shared.
      tokens_bt: int32 [B, T].
      segments_bt: int32 [B, T], document of every token; 0 is padding.
      z_weight: weight of the squared log-partition, which keeps logits from drifting.
      teacher: model to distil from, or None.
      temperature: divides both models' logits in the distillation.

    Returns:
      Negative log-likelihood (with the z term), and forward KL divergence from the teacher, times temperature squared.
    """
    mask_bt = target_mask(segments_bt)
    features_btd = model.features(tokens_bt, segments_bt=segments_bt)[:, :-1]
    rows = [_rows(features_btd), _rows(tokens_bt[:, 1:]), _rows(mask_bt)]
    if teacher is not None:
        rows.append(_rows(teacher.features(tokens_bt, segments_bt=segments_bt)[:, :-1]))

    @jax.checkpoint
    def chunk(chunk_rows: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        features_cd, target_c, mask_c, *teacher_cd = chunk_rows
        logits_cv = model.logits(features_cd)
        partition_c = jax.nn.logsumexp(logits_cv, axis=-1)
        chosen_c = jnp.take_along_axis(logits_cv, target_c[:, None], axis=-1)[:, 0]
        loss_c = partition_c - chosen_c + z_weight * jnp.square(partition_c)
        kl_c = jnp.zeros_like(loss_c)
        if teacher is not None:
            kl_c = temperature**2 * _forward_kl(teacher.logits(teacher_cd[0]), logits_cv, temperature)
        return jnp.sum(loss_c, where=mask_c), jnp.sum(kl_c, where=mask_c)

    losses, divergences = jax.lax.map(chunk, tuple(_chunked(row) for row in rows))
    return jnp.sum(losses), jnp.sum(divergences)


def similarity_penalty(params: Mapping[str, jax.Array], sharing: SharingMap, penalty: str = "norm") -> jax.Array:
    """How far the receivers of a map are from their donors, float32 scalar: mean over pairs, summed over the tie.

    `norm` is the L2 norm of the difference of the flattened slices (paper, equation 5), `mse` its mean square; `kl`
    and `js` take the slices' softmax as distributions: KL(receiver || donor), and the Jensen-Shannon divergence.

    Args:
      params: a dense model's parameters, whose pools hold every head.
      sharing: the pairs, and the projections that are to be equal.
      penalty: one of `PENALTIES`.
    """
    receivers = sharing.receivers
    donors = sharing.donor.ravel()[receivers]
    total = jnp.zeros((), jnp.float32)
    for projection in sharing.tie:
        pool = params[f"{projection}_pool_{'phd' if projection == 'o' else 'pdh'}"]
        group = sharing.heads_per_unit if projection in "qo" else 1
        receiver_ri, donor_ri = (_unit_rows(pool, units, group) for units in (receivers, donors))
        total += jnp.mean(_PENALTIES[penalty](receiver_ri, donor_ri))
    return total


def _unit_rows(pool: jax.Array, units: np.ndarray, group: int) -> jax.Array:
    """Flattened slices of whole units, float32 [units, G * D * H]."""
    slots = (units[:, None] * group + np.arange(group)).ravel()
    return pool[slots].astype(jnp.float32).reshape(len(units), -1)


def _norm(a_ri: jax.Array, b_ri: jax.Array) -> jax.Array:
    square_r = jnp.sum(jnp.square(a_ri - b_ri), axis=-1)
    # The norm has no derivative where a pair is equal already; such a pair is to stay as it is.
    equal_r = square_r == 0
    return jnp.where(equal_r, 0.0, jnp.sqrt(jnp.where(equal_r, 1.0, square_r)))


def _mse(a_ri: jax.Array, b_ri: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(a_ri - b_ri), axis=-1)


def _kl(a_ri: jax.Array, b_ri: jax.Array) -> jax.Array:
    return _divergence(jax.nn.log_softmax(a_ri), jax.nn.log_softmax(b_ri))


def _js(a_ri: jax.Array, b_ri: jax.Array) -> jax.Array:
    log_a_ri, log_b_ri = jax.nn.log_softmax(a_ri), jax.nn.log_softmax(b_ri)
    log_middle_ri = jnp.logaddexp(log_a_ri, log_b_ri) - jnp.log(2.0)
    return 0.5 * (_divergence(log_a_ri, log_middle_ri) + _divergence(log_b_ri, log_middle_ri))


def _divergence(log_p_ri: jax.Array, log_q_ri: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_p_ri) * (log_p_ri - log_q_ri), axis=-1)


_PENALTIES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "norm": _norm,
    "mse": _mse,
    "kl": _kl,
    "js": _js,
}


def _forward_kl(teacher_cv: jax.Array, student_cv: jax.Array, temperature: float) -> jax.Array:
    teacher_cv = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_cv) / temperature)
    return _divergence(teacher_cv, jax.nn.log_softmax(student_cv / temperature))


def _rows(value_bt: jax.Array) -> jax.Array:
    return value_bt.reshape(-1, *value_bt.shape[2:])


def _chunked(rows: jax.Array) -> jax.Array:
    """Rows as [chunks, HEAD_TOKENS, ...], the last chunk filled up with zeros (which the mask leaves out)."""
    size = min(HEAD_TOKENS, rows.shape[0])
    missing = -rows.shape[0] % size
    padded = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
    return padded.reshape(-1, size, *rows.shape[1:])
