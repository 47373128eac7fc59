"""What a model's layers run with: how many units each has, and how wide their heads are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.sharing.map import SharingMap


@dataclass(frozen=True)
class HeadShape:
    """The heads of a layer, which are all alike as it runs.

    Attributes:
      units: key heads, and as many value heads; each with its query heads.
      qk: width of queries and keys.
      vo: width of values and head outputs.
    """

    units: int
    qk: int
    vo: int


def head_shapes(config: LlamaConfig, sharing: SharingMap | None = None, parts: int = 1) -> tuple[HeadShape, ...]:
    """What each layer runs with: nothing of a dropped unit.

    Args:
      config: the architecture.
      sharing: who shares with whom, and who is dropped; None for a dense model.
      parts: devices that cut a layer's units evenly, where they divide all of them: a layer that they do not divide any
        more has units of zeros besides.
    """
    units, width = config.num_kv_heads, config.head_dim
    if sharing is None:
        return (HeadShape(units, width, width),) * config.num_layers
    parts = parts if units % parts == 0 else 1
    kept_l = np.count_nonzero(~sharing.dropped, axis=1)
    return tuple(HeadShape(-(-int(kept) // parts) * parts, width, width) for kept in kept_l)


def running_heads(sharing: SharingMap, projection: str, shapes: Sequence[HeadShape]) -> list[np.ndarray]:
    """Pool rows of the heads that each layer runs, int32 [n]: of its kept units, and P for each head of zeros.

    Of a map with widths [n * H]: of each column of these heads, P for what is cut.
    """
    stored = len(sharing.stored_slots(projection))
    index_lus = sharing.pool_index(projection).reshape(*sharing.donor.shape, -1)
    kept = [index_us[~dropped_u].ravel() for index_us, dropped_u in zip(index_lus, sharing.dropped, strict=True)]
    return [
        np.pad(index_n, (0, shape.units * index_lus.shape[2] - len(index_n)), constant_values=stored)
        for index_n, shape in zip(kept, shapes, strict=True)
    ]


def cache_slots(config: LlamaConfig, length: int) -> int:
    """Slots that a cache for so many positions of every row has: no more than its window where all layers have one."""
    windows = [length if window is None else window for window in config.windows]
    return min(length, max(windows))


def columns(shapes: Sequence[HeadShape]) -> int:
    """Columns of keys and values in some layers; a token's products are proportional to them, and so is the cache."""
    return sum(shape.units * (shape.qk + shape.vo) for shape in shapes)
