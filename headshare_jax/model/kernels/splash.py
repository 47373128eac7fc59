"""Attention by JAX's splash kernel for TPUs, which stores no scores."""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from headshare_jax.model.attention import HEADS, SPLASH_BLOCKS


def splash(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array,
    *,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The TPU's kernel on one device's part; `interpret` runs its program on any device."""
    length, heads = q_btnh.shape[1:3]
    block = next(block for block in SPLASH_BLOCKS if length % block == 0)
    sizes = splash_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    square = (length, length)
    seen = splash_mask.CausalMask(square) if window is None else splash_mask.LocalMask(square, (window - 1, 0), 0)
    mask = splash_mask.MultiHeadMask([seen] * heads)
    kernel = splash_kernel.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        # Else the way back would run the way forward once more for the logarithms of its sums.
        residual_checkpoint_name=HEADS,
        interpret=interpret,
    )
    heads_first = (each.swapaxes(1, 2) for each in (q_btnh, k_btkh, v_btkh))
    out_bnth = jax.vmap(kernel)(*heads_first, splash_kernel.SegmentIds(segments_bt, segments_bt))
    return out_bnth.swapaxes(1, 2)
