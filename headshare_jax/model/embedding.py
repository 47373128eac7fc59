"""The embedding of tokens on a mesh, where no device holds more than its part of the table."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from headshare_jax.model.mesh import BATCH, rows_of


def look_up(
    embed_vd: jax.Array, tokens_bt: jax.Array, dtype: str, batch_sharding: NamedSharding | None = None
) -> jax.Array:
    """Embeddings [B, T, D] of tokens, in a type; on a mesh they lie where the batch does.

    Left to itself, XLA would gather the embeddings of all tokens on every device. Here each looks up its part of D for
    the tokens of its fsdp group, and gets the other parts for its own tokens: nothing crosses the data axis.

    Args:
      embed_vd: the table; on a mesh cut as `parameters.PARAMETERS` has it.
      tokens_bt: int32 [B, T].
      dtype: of the result.
      batch_sharding: where the batch lies, by its first axis; None leaves it to the compiler.
    """
    mesh = None if batch_sharding is None else batch_sharding.mesh
    if not isinstance(mesh, Mesh) or not _is_cut(mesh, embed_vd.shape, len(tokens_bt)):
        return embed_vd[tokens_bt].astype(dtype)
    cuts_vocabulary = embed_vd.shape[0] % mesh.shape["tensor"] == 0
    place = PartitionSpec("tensor" if cuts_vocabulary else None, "fsdp")
    parts = jax.shard_map(
        partial(_of_part, dtype=dtype, cuts_vocabulary=cuts_vocabulary),
        mesh=mesh,
        in_specs=(place, PartitionSpec(BATCH)),
        out_specs=PartitionSpec(BATCH),
    )
    x_btd: jax.Array = parts(embed_vd, tokens_bt)
    return x_btd


def _is_cut(mesh: Mesh, table: tuple[int, ...], batch: int) -> bool:
    """Whether the fsdp axis cuts the table, and the mesh the batch."""
    fsdp = mesh.shape["fsdp"]
    return fsdp > 1 and table[1] % fsdp == 0 and batch % rows_of(mesh) == 0


def _of_part(embed_vd: jax.Array, tokens_bt: jax.Array, *, dtype: str, cuts_vocabulary: bool) -> jax.Array:
    """What a device looks up in its part of the table and is sent by its fsdp group."""
    tokens_bt = jax.lax.all_gather(tokens_bt, "fsdp", tiled=True)
    if cuts_vocabulary:
        tokens_bt = tokens_bt - jax.lax.axis_index("tensor") * len(embed_vd)
        here_bt1 = ((tokens_bt >= 0) & (tokens_bt < len(embed_vd)))[..., None]
        found_btd = embed_vd[jnp.clip(tokens_bt, 0, len(embed_vd) - 1)].astype(dtype)
        x_btd = jax.lax.psum(jnp.where(here_bt1, found_btd, jnp.zeros_like(found_btd)), "tensor")
    else:
        x_btd = embed_vd[tokens_bt].astype(dtype)
    parts_btd: jax.Array = jax.lax.all_to_all(x_btd, "fsdp", split_axis=0, concat_axis=2, tiled=True)
    return parts_btd
