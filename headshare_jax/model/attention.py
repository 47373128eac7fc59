"""Attention: in blocks of queries on any device, and in training by the kernels that JAX ships.

Splash attention on TPUs and cuDNN's on GPUs store no scores. They give what the blocks give for tokens that see the
earlier tokens of their own segment, or the last of them: those in their window.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from headshare_jax.config import LlamaConfig
from headshare_jax.model.mesh import BATCH, nvidia_capability, rows_of

# Queries whose attention scores are in memory at a time, unless that makes more blocks than are good to unroll.
QUERY_BLOCK, MAX_QUERY_BLOCKS = 128, 8
# Queries, and keys, that the TPU's kernel holds at a time; lengths must be multiples of the smallest of them.
SPLASH_BLOCKS = (512, 256, 128)
# What cuDNN's kernel takes: types, widest heads, and GPUs from Ampere on.
_CUDNN_TYPES, _CUDNN_WIDTH, _CUDNN_CAPABILITY = ("bfloat16", "float16"), 128, 8.0

# Name by which a remat policy keeps head outputs; a kernel gives it to what its way back needs besides.
HEADS = "heads"

# Arrays with a batch on their first axis, such as queries, keys, values and a mask; and what runs a function of one row
# on them.
Rows = tuple[jax.Array, ...]
InTurns = Callable[[Callable[..., jax.Array], Rows], jax.Array]
# How many tokens a token sees, itself among them: a number that the program is made for, or one that it is given, as
# where layers differ, int32. None: all earlier ones.
Window = int | jax.Array | None


def tokens_last(x_btkh: jax.Array) -> jax.Array:
    """Keys or values [B, T, K, H] as they are cached, [B, K, H, T]."""
    return x_btkh.transpose(0, 2, 3, 1)


def attend(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, mask_bts: jax.Array | None = None, **settings: Any
) -> jax.Array:
    """`attend_cached` to keys and values as a layer makes them."""
    return attend_cached(q_btnh, tokens_last(k_bskh), tokens_last(v_bskh), mask_bts, **settings)


def attend_cached(
    q_btnh: jax.Array,
    k_bkhs: jax.Array,
    v_bkhs: jax.Array,
    mask_bts: jax.Array | None = None,
    *,
    causal: bool = False,
    window: Window = None,
    in_turns: InTurns | None = None,
) -> jax.Array:
    """Head outputs [B, T, N, H], as wide as the values.

    Args:
      q_btnh: queries, divided by the square root of H, as `rotate_queries` does.
      k_bkhs, v_bkhs: keys, as wide as the queries, and values, whose width may be another.
      mask_bts: bool [B or 1, T, S], what each query sees; at least one key. None: all that is not later.
      causal: with a mask, that it lets query t see no key after t: blocks of queries then need only the keys before
        their end.
      window: query t sees, of the keys that a mask leaves, those from t - window + 1 to t. Blocks of queries need only
        the keys of their windows if it is a number; one that is given masks those before.
      in_turns: how a CPU runs row after row, whose scores then stay in its cache; None runs all rows together.
    """
    batch, length, heads, _ = q_btnh.shape
    if heads == 0:
        return jnp.zeros((batch, length, 0, v_bkhs.shape[2]), q_btnh.dtype)
    causal = causal or mask_bts is None or window is not None
    of_row = partial(_attend_row, causal=causal, window=window)
    rows: Rows = (q_btnh, k_bkhs, v_bkhs)
    if mask_bts is not None:
        rows = (*rows, jnp.broadcast_to(mask_bts, (batch, *mask_bts.shape[1:])))
    together = jax.vmap(of_row)
    if in_turns is None or batch == 1 or length == 1:
        return checkpoint_name(together(*rows), HEADS)
    out_btnh: jax.Array = jax.lax.platform_dependent(*rows, cpu=lambda *rows: in_turns(of_row, rows), default=together)
    return checkpoint_name(out_btnh, HEADS)


def rows_apart(of_row: Callable[..., jax.Array], rows: Rows) -> jax.Array:
    """Row after row, outputs in an array of their own."""
    return jax.lax.map(lambda row: of_row(*row), rows)


def rows_in_place(of_row: Callable[..., jax.Array], rows: Rows) -> jax.Array:
    """Row after row, outputs in place of queries as wide as they: not for training, which needs these again."""
    queries, _, values, *_ = rows
    if queries.shape[-1] != values.shape[-2]:
        return rows_apart(of_row, rows)
    others = rows[1:]

    def of_next(row: jax.Array, out_btnh: jax.Array) -> jax.Array:
        return out_btnh.at[row].set(of_row(out_btnh[row], *(each[row] for each in others)))

    return jax.lax.fori_loop(0, len(queries), of_next, queries)


def _attend_row(
    q_tnh: jax.Array,
    k_khs: jax.Array,
    v_khs: jax.Array,
    mask_ts: jax.Array | None = None,
    *,
    causal: bool,
    window: Window,
) -> jax.Array:
    """Head outputs [T, N, H] of one row, as wide as the values."""
    length, heads, width = q_tnh.shape
    groups, _, slots = k_khs.shape
    q_ktgh = q_tnh.reshape(length, groups, heads // groups, width).swapaxes(0, 1)
    most = window if isinstance(window, int) else slots
    # Of queries that see few keys, a block reads not many more than one of them.
    block = max(QUERY_BLOCK, min(-(-length // MAX_QUERY_BLOCKS), most))
    earlier_tt = jnp.tril(jnp.ones((block, block), bool))
    blocks = []
    for begin in range(0, length, block):
        end = min(begin + block, length)
        seen = slice(max(begin + 1 - most, 0), end if causal else slots)
        mask_tm = earlier_tt[: end - begin, : end - begin] if mask_ts is None else mask_ts[begin:end, seen]
        if window is not None and (end > most or not isinstance(window, int)):
            back_ts = jnp.arange(begin, end)[:, None] - jnp.arange(seen.start, seen.stop)[None]
            near_ts = (back_ts >= 0) & (back_ts < window)
            mask_tm = near_ts if mask_ts is None else mask_tm & near_ts
        blocks.append(_attend_block(q_ktgh[:, begin:end], k_khs[..., seen], v_khs[..., seen], mask_tm))
    return jnp.concatenate(blocks, axis=1).swapaxes(0, 1).reshape(length, heads, v_khs.shape[1])


@jax.checkpoint
def _attend_block(q_ktgh: jax.Array, k_khs: jax.Array, v_khs: jax.Array, mask_tm: jax.Array) -> jax.Array:
    """Outputs [K, T, G, H] of a block of queries, each of which sees all keys but those of the last M that it masks.

    They are as wide as the values. Scores are computed again in the backward pass.
    """
    groups, length, heads, width = q_ktgh.shape
    # A group's heads have their keys in common: they are rows of one product.
    q_kmh = q_ktgh.reshape(groups, length * heads, width)
    scores_kms = jnp.einsum("kmh,khs->kms", q_kmh, k_khs, preferred_element_type=jnp.float32)
    scores_ktgs = scores_kms.reshape(groups, length, heads, -1)
    masked = slice(k_khs.shape[2] - mask_tm.shape[1], None)
    left_ktgm = jnp.where(mask_tm[None, :, None], scores_ktgs[..., masked], -jnp.inf)
    scores_ktgs = scores_ktgs.at[..., masked].set(left_ktgm)
    top_ktgs = jax.lax.stop_gradient(jnp.max(scores_ktgs, axis=-1, keepdims=True))
    weights_ktgs = jnp.exp(scores_ktgs - top_ktgs)
    weights_kms = weights_ktgs.astype(v_khs.dtype).reshape(scores_kms.shape)
    out_kmh = jnp.einsum("kms,khs->kmh", weights_kms, v_khs, preferred_element_type=jnp.float32)
    out_ktgh = out_kmh.reshape(groups, length, heads, v_khs.shape[1]) / jnp.sum(weights_ktgs, axis=-1)[..., None]
    return out_ktgh.astype(q_ktgh.dtype)


def among_tokens(
    config: LlamaConfig, dtype: str, mesh: Mesh | None, tokens_bt: jax.Array, segments_bt: jax.Array | None
) -> Callable[[jax.Array, jax.Array, jax.Array, Window], tuple[jax.Array, None]]:
    """Attention among some tokens within their segments, by a kernel where their mesh has one and divides them.

    Args:
      config: the architecture.
      dtype: that it is computed in.
      mesh: where the batch lies, if it is cut over one.
      tokens_bt: int32 [B, T].
      segments_bt: int32 [B, T], as of `Llama.features`.
    """
    batch, length = tokens_bt.shape
    divides = mesh is not None and batch % rows_of(mesh) == 0
    if mesh is not None and divides and has_kernel(mesh, length, config.head_dim, dtype):
        document_bt = jnp.zeros_like(tokens_bt) if segments_bt is None else segments_bt
        flash = partial(flash_attention, segments_bt=document_bt, mesh=mesh, width=config.head_dim)

        def by_kernel(
            q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, window: Window
        ) -> tuple[jax.Array, None]:
            if window is None or isinstance(window, int):
                return flash(q_btnh, k_btkh, v_btkh, window=window), None
            # Layers differ: a kernel's window is part of its program.
            own = config.sliding_window
            near = partial(flash, window=own)
            return jax.lax.cond(window == own, near, flash, q_btnh, k_btkh, v_btkh), None

        return by_kernel
    mask_bts = None
    if segments_bt is not None:
        earlier_ts = jnp.tril(jnp.ones((length, length), bool))
        mask_bts = earlier_ts[None] & (segments_bt[:, :, None] == segments_bt[:, None, :])
    in_turns = rows_apart if mesh is None or mesh.size == 1 else None
    masked = partial(attend, mask_bts=mask_bts, causal=True, in_turns=in_turns)
    return lambda q_btnh, k_btkh, v_btkh, window: (masked(q_btnh, k_btkh, v_btkh, window=window), None)


def has_kernel(mesh: Mesh, length: int, width: int, dtype: str) -> bool:
    """Whether there is a kernel for a mesh's devices, sequences of this length, and heads of this width and type."""
    device = mesh.devices.flat[0]
    if device.platform == "tpu":
        return length % SPLASH_BLOCKS[-1] == 0
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
    window: int | None = None,
    width: int = 0,
    kernel: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Head outputs [B, T, N, H] of causal attention within segments, as wide as the values.

    The batch is cut over the mesh's data and fsdp axes, heads over tensor where it divides them: no device needs
    another's part.

    Args:
      q_btnh, k_btkh, v_btkh: queries, divided by the square root of H, keys and values.
      segments_bt: int32 [B, T], document of every token.
      mesh: where they lie.
      window: how many tokens a token sees, itself among them; None: all earlier ones.
      width: heads that are less wide, than this or than others of them, are given to the kernel with zeros behind them.
      kernel: `splash` of `kernels.splash` or `cudnn` of `kernels.cudnn`; by default that of the mesh's devices.
    """
    if kernel is None:
        kernel = _kernel_of(mesh)
    tensor = mesh.shape["tensor"]
    heads = "tensor" if q_btnh.shape[2] % tensor == 0 and k_btkh.shape[2] % tensor == 0 else None
    placed = PartitionSpec(BATCH, None, heads, None)
    local = jax.shard_map(
        partial(kernel, window=window),
        mesh=mesh,
        in_specs=(placed, placed, placed, PartitionSpec(BATCH, None)),
        out_specs=placed,
        check_vma=False,
    )
    width = max(width, q_btnh.shape[-1], v_btkh.shape[-1])
    out_btnh: jax.Array = local(*(_widened(each, width) for each in (q_btnh, k_btkh, v_btkh)), segments_bt)
    return out_btnh[..., : v_btkh.shape[-1]]


def _widened(x_btnh: jax.Array, width: int) -> jax.Array:
    missing = width - x_btnh.shape[-1]
    return jnp.pad(x_btnh, [(0, 0)] * 3 + [(0, missing)]) if missing else x_btnh


def _kernel_of(mesh: Mesh) -> Callable[..., jax.Array]:
    # Imported only where they run, for they rest on parts of JAX that are not promised to stay.
    if mesh.devices.flat[0].platform == "tpu":
        from headshare_jax.model.kernels.splash import splash

        return splash
    from headshare_jax.model.kernels.cudnn import cudnn

    return cudnn
