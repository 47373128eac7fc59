"""Attention in training by the kernels that JAX ships for TPUs and GPUs, which store no scores.

They give what `modeling` computes in blocks, for a token that sees the earlier tokens of its own segment.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, PartitionSpec

from headshare_jax.mesh import BATCH

# Queries, and keys, that a kernel holds at a time; lengths must be multiples of the smallest of them.
BLOCKS = (512, 256, 128)


def has_kernel(mesh: Mesh, length: int) -> bool:
    """Whether there is a kernel for the devices of a mesh and sequences of this length."""
    return mesh.devices.flat[0].platform == "tpu" and length % BLOCKS[-1] == 0


def flash_attention(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array,
    mesh: Mesh,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Head outputs [B, T, N, H] of causal attention within segments.

    The batch is cut over the mesh's data and fsdp axes, heads over tensor where it divides them: no device needs
    another's part.

    Args:
      q_btnh, k_btkh, v_btkh: queries, keys and values, rotary embedding applied.
      segments_bt: int32 [B, T], document of every token.
      mesh: where they lie.
      interpret: run the kernel's program on any device, for tests.
    """
    tensor = mesh.shape["tensor"]
    heads = "tensor" if q_btnh.shape[2] % tensor == 0 and k_btkh.shape[2] % tensor == 0 else None
    placed = PartitionSpec(BATCH, None, heads, None)
    local = jax.shard_map(
        partial(_splash, interpret=interpret),
        mesh=mesh,
        in_specs=(placed, placed, placed, PartitionSpec(BATCH, None)),
        out_specs=placed,
        check_vma=False,
    )
    out_btnh: jax.Array = local(q_btnh, k_btkh, v_btkh, segments_bt)
    return out_btnh


def _splash(
    q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, segments_bt: jax.Array, *, interpret: bool
) -> jax.Array:
    length, heads, width = q_btnh.shape[1:]
    block = next(block for block in BLOCKS if length % block == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    scaled_bnth = (q_btnh * jnp.asarray(width**-0.5, q_btnh.dtype)).swapaxes(1, 2)
    out_bnth = jax.vmap(kernel)(
        scaled_bnth, k_btkh.swapaxes(1, 2), v_btkh.swapaxes(1, 2), splash.SegmentIds(segments_bt, segments_bt)
    )
    return out_bnth.swapaxes(1, 2)
