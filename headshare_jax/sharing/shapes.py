"""What a model's layers run with: how many units each has, how wide their heads are, and which columns they are.

The heads of a layer are all as wide as its widest. A head that keeps p rotary pairs of P has the first columns of its
pairs at 0 .. p - 1 and the second ones at P .. P + p - 1; then come its columns that do not turn. The rest is zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.parameters import PROJECTIONS, index_name
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.widths import Widths

# On a TPU heads run in widths that are multiples of this: it keeps an array's last but one axis, as widths are in the
# cache, in tiles of so many, and turns a cache whose widths do not fit to another order of its axes and back.
TPU_MULTIPLE = 8


@dataclass(frozen=True)
class HeadShape:
    """The heads of a layer, which are all alike as it runs.

    Attributes:
      units: key heads, and as many value heads; each with its query heads.
      pairs: rotary pairs of queries and keys.
      still: columns of queries and keys that do not turn.
      vo: width of values and head outputs.
    """

    units: int
    pairs: int
    still: int
    vo: int

    @property
    def qk(self) -> int:
        """Width of queries and keys."""
        return 2 * self.pairs + self.still


def head_shapes(
    config: LlamaConfig, sharing: SharingMap | None = None, parts: int = 1, multiple: int = 1
) -> tuple[HeadShape, ...]:
    """What each layer runs with: nothing of a dropped unit, and heads as wide as the widest unit of the layer.

    Args:
      config: the architecture.
      sharing: who shares with whom, who is dropped and who is slim; None for a dense model.
      parts: devices that cut a layer's units evenly, where they divide all of them: a layer that they do not divide any
        more has units of zeros besides.
      multiple: widths of heads that are not whole are filled up to multiples of this, as far as whole heads go.
    """
    units, turning, width = config.num_kv_heads, config.rotary_dim // 2, config.head_dim
    whole = HeadShape(units, turning, width - 2 * turning, width)
    if sharing is None:
        return (whole,) * config.num_layers
    parts = parts if units % parts == 0 else 1
    shapes = []
    for layer, kept_u in enumerate(~sharing.dropped):
        count = -(-int(kept_u.sum()) // parts) * parts
        if sharing.widths is None or not kept_u.any():
            shapes.append(HeadShape(count, whole.pairs, whole.still, whole.vo))
            continue
        pairs_uj = sharing.widths.pairs[layer, kept_u]
        pairs, still = (int(each.sum(axis=1).max(initial=0)) for each in np.split(pairs_uj, [turning], axis=1))
        pairs = min(pairs + -(2 * pairs + still) % multiple // 2, turning)
        still = min(still + -(2 * pairs + still) % multiple, whole.still)
        rank = int(sharing.widths.rank[layer, kept_u].max())
        shapes.append(HeadShape(count, pairs, still, min(rank + -rank % multiple, width)))
    return tuple(shapes)


def running_tables(sharing: SharingMap, shapes: Sequence[HeadShape]) -> dict[str, list[np.ndarray]]:
    """What of the pools each layer runs, by the names that layers read it by.

    Head indices: pool rows, int32 [n], of the heads of kept units, and P for each head of zeros; of a map with widths
    [n, W], of each of their columns, and P for zeros. With these `pair_lkp`, int32 [K, P], rotary pairs of key heads,
    if some layer's are not all of them in their order.
    """
    tables = {index_name(projection): _index(sharing, projection, shapes) for projection in PROJECTIONS}
    widths = sharing.widths
    if widths is None or all(shape.pairs == widths.rotary_dim // 2 for shape in shapes):
        return tables
    pair_lkp = []
    for layer, shape in enumerate(shapes):
        units = np.flatnonzero(~sharing.dropped[layer]).tolist()
        kept = [_columns(widths, layer, unit, shape)[: shape.pairs] for unit in units]
        # What pads a head, or is a head of zeros, may turn by any angle.
        pairs = np.maximum(np.reshape(kept, (len(kept), shape.pairs)), 0)
        pair_lkp.append(np.pad(pairs, ((0, shape.units - len(kept)), (0, 0))).astype(np.int32))
    return {**tables, "pair_lkp": pair_lkp}


def _index(sharing: SharingMap, projection: str, shapes: Sequence[HeadShape]) -> list[np.ndarray]:
    """Pool rows of the heads of each layer, or of their columns."""
    stored, group = len(sharing.stored_slots(projection)), sharing.heads_per_unit if projection in "qo" else 1
    index_lugs = sharing.pool_index(projection).reshape(*sharing.donor.shape, group, -1)
    tables = []
    for layer, shape in enumerate(shapes):
        kept = np.flatnonzero(~sharing.dropped[layer])
        if sharing.widths is None:
            rows = index_lugs[layer, kept].reshape(len(kept) * group)
            tables.append(np.pad(rows, (0, shape.units * group - len(rows)), constant_values=stored))
            continue
        width = shape.qk if projection in "qk" else shape.vo
        rows = np.full((shape.units, group, width), stored, np.int32)
        for place, unit in enumerate(kept.tolist()):
            columns = _columns(sharing.widths, layer, unit, shape) if projection in "qk" else np.arange(width)
            rows[place] = np.where(columns < 0, stored, index_lugs[layer, unit][:, columns])
        tables.append(rows.reshape(shape.units * group, width))
    return tables


def _columns(widths: Widths, layer: int, unit: int, shape: HeadShape) -> np.ndarray:
    """Which column of a head of q or k each place in its narrow one is, int [W]; -1 for what is zeros."""
    turning = widths.rotary_dim // 2
    pairs_j = widths.pairs[layer, unit]

    def placed(kept: np.ndarray, count: int) -> np.ndarray:
        return np.pad(kept, (0, count - len(kept)), constant_values=-1)

    # Of a layer that keeps all pairs of some unit, every pair has its own place.
    whole = np.where(pairs_j[:turning], np.arange(turning), -1)
    pairs = whole if shape.pairs == turning else placed(np.flatnonzero(pairs_j[:turning]), shape.pairs)
    still = placed(2 * turning + np.flatnonzero(pairs_j[turning:]), shape.still)
    return np.concatenate([pairs, np.where(pairs < 0, -1, pairs + turning), still])


def cache_slots(config: LlamaConfig, length: int) -> int:
    """Slots that a cache for so many positions of every row has: no more than its window where all layers have one."""
    windows = [length if window is None else window for window in config.windows]
    return min(length, max(windows))


def columns(shapes: Sequence[HeadShape]) -> int:
    """Columns of keys and values in some layers; a token's products are proportional to them, and so is the cache."""
    return sum(shape.units * (shape.qk + shape.vo) for shape in shapes)
