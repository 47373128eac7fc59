"""Attention in training by the kernels that JAX ships: splash attention on TPUs, cuDNN's on GPUs. They store no scores.

They give what `modeling` computes in blocks, for a token that sees the earlier tokens of its own segment.
"""

from collections.abc import Callable
from typing import Literal

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, PartitionSpec

from headshare_jax.mesh import BATCH, nvidia_capability

# Queries, and keys, that the TPU's kernel holds at a time; lengths must be multiples of the smallest of them.
BLOCKS = (512, 256, 128)
# What cuDNN's kernel takes: types, widest heads, and GPUs from Ampere on.
_CUDNN_TYPES, _CUDNN_WIDTH, _CUDNN_CAPABILITY = ("bfloat16", "float16"), 128, 8.0


def has_kernel(mesh: Mesh, length: int, width: int, dtype: str) -> bool:
    """Whether there is a kernel for a mesh's devices, sequences of this length, and heads of this width and type."""
    device = mesh.devices.flat[0]
    if device.platform == "tpu":
        return length % BLOCKS[-1] == 0
    if device.platform == "gpu":
        fits = dtype in _CUDNN_TYPES and width <= _CUDNN_WIDTH and width % 8 == 0 and length % 64 == 0
        return fits and nvidia_capability(device) >= _CUDNN_CAPABILITY
    return False


def flash_attention(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array,
    mesh: Mesh,
    *,
    kernel: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Head outputs [B, T, N, H] of causal attention within segments.

    The batch is cut over the mesh's data and fsdp axes, heads over tensor where it divides them: no device needs
    another's part.

    Args:
      q_btnh, k_btkh, v_btkh: queries, divided by the square root of H, keys and values.
      segments_bt: int32 [B, T], document of every token.
      mesh: where they lie.
      kernel: `splash` or `cudnn`; by default that of the mesh's devices.
    """
    if kernel is None:
        kernel = splash if mesh.devices.flat[0].platform == "tpu" else cudnn
    tensor = mesh.shape["tensor"]
    heads = "tensor" if q_btnh.shape[2] % tensor == 0 and k_btkh.shape[2] % tensor == 0 else None
    placed = PartitionSpec(BATCH, None, heads, None)
    local = jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(placed, placed, placed, PartitionSpec(BATCH, None)),
        out_specs=placed,
        check_vma=False,
    )
    out_btnh: jax.Array = local(q_btnh, k_btkh, v_btkh, segments_bt)
    return out_btnh


def splash(
    q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, segments_bt: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """The TPU's kernel on one device's part; `interpret` runs its program on any device."""
    length, heads = q_btnh.shape[1:3]
    block = next(block for block in BLOCKS if length % block == 0)
    sizes = splash_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads)
    kernel = splash_kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    heads_first = (each.swapaxes(1, 2) for each in (q_btnh, k_btkh, v_btkh))
    out_bnth = jax.vmap(kernel)(*heads_first, splash_kernel.SegmentIds(segments_bt, segments_bt))
    return out_bnth.swapaxes(1, 2)


def cudnn(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """The GPU's kernel on one device's part; it reads a mask of a byte or two per score, which all heads share."""
    segments_b1ts = segments_bt[:, None, :, None] == segments_bt[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_btnh, k_btkh, v_btkh, mask=segments_b1ts, scale=1.0, is_causal=True, implementation=implementation
    )
