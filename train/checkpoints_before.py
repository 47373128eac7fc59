"""Checkpoints of release 0.1, which Orbax wrote: read, so that its runs go on."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from headshare_jax.convert import storage
from headshare_jax.convert.checkpoint_document import FORMAT
from headshare_jax.errors import HeadshareError


def is_whole(folder: Path) -> bool:
    """Whether a folder is such a checkpoint; one that was not written to its end has another name."""
    return storage.is_folder(folder / "arrays") and storage.is_file(folder / "_CHECKPOINT_METADATA")


def read(folder: Path) -> dict[str, Any]:
    """Its document; errors as of `checkpoint_document.read`."""
    path = folder / "document" / "metadata"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadshareError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise HeadshareError(f"{folder} is not a checkpoint of a PostShare run")
    if "checksums" not in document:
        raise HeadshareError("it is of an earlier version, which kept no checksums; begin a new run")
    with suppress(OSError, ValueError, KeyError, TypeError):
        metrics = json.loads((folder / "metrics" / "metrics").read_text(encoding="utf-8"))
        document["perplexity"] = float(metrics["perplexity"])
    return document


def restore(folder: Path, document: dict[str, Any], target: Any) -> Any:
    """Its arrays, where a tree of shapes, types and shardings says.

    Raises:
      HeadshareError: they are not those that were saved.
    """
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    try:
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        arrays = handler.restore(
            (folder / "arrays").resolve(), args=ocp.args.PyTreeRestore(target, restore_args=restore_args)
        )
    except Exception as error:  # Orbax and its storage show damage in many ways
        raise HeadshareError((str(error).splitlines() or [type(error).__name__])[0]) from error
    finally:
        handler.close()
    if [int(_checksum(leaf)) for leaf in jax.tree.leaves(arrays)] != document["checksums"]:
        raise HeadshareError("its arrays are not those that were saved")
    return arrays


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """Sum of an array's 32-bit words, each times an odd number by its place, modulo 2^32."""
    if array.ndim < 3:
        return _weighted_sum(array, jnp.uint32(0))
    # Layer by layer, or head by head: a CPU holds all the products that it sums.
    count, size = array.shape[0], math.prod(array.shape[1:])
    first_of_row = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(size % 2**32)
    return jnp.sum(jax.lax.map(lambda row: _weighted_sum(*row), (array, first_of_row)), dtype=jnp.uint32)


def _weighted_sum(array: jax.Array, first: jax.Array) -> jax.Array:
    """Sum of an array's words, the i-th times 2 (first + i) + 1."""
    place, stride = jnp.full(array.shape, first), 1
    for axis in reversed(range(array.ndim)):
        place += jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        stride *= array.shape[axis]
    return jnp.sum(_words(array) * (2 * place + 1), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits of every element, uint32 of the array's shape."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = array if array.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(array, unsigned)
    return bits.astype(jnp.uint32)
