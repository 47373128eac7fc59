"""Attention by cuDNN on NVIDIA GPUs, which stores no scores."""

from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from headshare_jax.model.attention import HEADS


def cudnn(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array,
    *,
    window: int | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """The GPU's kernel on one device's part; it reads a mask of a byte or two per score, which all heads share.

    With a window it needs cuDNN 9.10.2 or newer.
    """
    segments_b1ts = segments_bt[:, None, :, None] == segments_bt[:, None, None, :]
    out_btnh: jax.Array = jax.nn.dot_product_attention(
        q_btnh,
        k_btkh,
        v_btkh,
        mask=segments_b1ts,
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return checkpoint_name(out_btnh, HEADS)
