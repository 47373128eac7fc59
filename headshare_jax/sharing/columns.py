"""Pools by heads and pools by columns: how one is laid out as the other, of NumPy's arrays and of JAX's."""

from typing import TypeVar

import jax
import numpy as np

from headshare_jax.parameters import PARAMETERS

Array = TypeVar("Array", np.ndarray, jax.Array)


def to_columns(name: str, heads: Array) -> Array:
    """Heads of a parameter, [n, D, H], [n, H, D] or [n, H], as columns, head after head: [n * H, D] or [n * H]."""
    heads = heads.swapaxes(1, 2) if PARAMETERS[name].axes == "pdh" else heads
    return heads.reshape(-1, *heads.shape[2:])


def to_heads(name: str, rows: Array, slots: int) -> Array:
    """Inverse of `to_columns`, H slots to a head; with 1 slot to each, rows are heads already."""
    if slots == 1:
        return rows
    heads = rows.reshape(-1, slots, *rows.shape[1:])
    return heads.swapaxes(1, 2) if PARAMETERS[name].axes == "pdh" else heads


def columns_at(name: str, pool: jax.Array, slots: np.ndarray, head_dim: int) -> jax.Array:
    """Columns of a pool by heads, at flat slots (head * H + column) [C]: [C, D] or [C]."""
    at = {"p": slots // head_dim, "h": slots % head_dim}
    return pool[tuple(at.get(axis, slice(None)) for axis in PARAMETERS[name].axes)]


def over_heads(name: str, kept_nh: np.ndarray) -> np.ndarray:
    """What is said of heads' columns, [n, H], as it broadcasts over heads of a parameter."""
    axes = PARAMETERS[name].axes
    return np.expand_dims(kept_nh, axes.index("d")) if "d" in axes else kept_nh
