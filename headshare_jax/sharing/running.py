"""What it costs to run a model: its key/value cache, and the operations that a token takes."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.shapes import cache_slots, columns, head_shapes


@dataclass(frozen=True)
class Costs:
    """What it costs to add a token to each of some texts.

    Attributes:
      cache_bytes: keys and values of all positions of all texts.
      projections: FLOPs a token of the q, k, v and o projections.
      attention: FLOPs a token of scores and weighted values.
      rest: FLOPs a token of the MLPs and the output head.
    """

    cache_bytes: int
    projections: int
    attention: int
    rest: int

    @property
    def flops(self) -> int:
        """FLOPs a token in all."""
        return self.projections + self.attention + self.rest


@dataclass(frozen=True)
class Running:
    """What a model costs to run on one device, beside what it would cost dense.

    Attributes:
      context: positions of every text, which a token's attention sees as far as windows let it.
      batch: texts.
      dense: costs with all units whole.
      model: costs as it runs, without dropped units.
      padding: which part of these is padding: heads of a layer that runs are all as wide as its widest.
    """

    context: int
    batch: int
    dense: Costs
    model: Costs
    padding: Costs

    def to_json(self) -> dict[str, Any]:
        """The costs as plain data, with their sums."""
        sums = {name: {"flops": getattr(self, name).flops} for name in ("dense", "model", "padding")}
        return {name: value | sums[name] if name in sums else value for name, value in asdict(self).items()}


def running(config: LlamaConfig, sharing: SharingMap | None, *, context: int, batch: int, itemsize: int = 2) -> Running:
    """Counts what a model costs to run; all but the MLPs and the output head is proportional to columns of heads.

    Args:
      config: the architecture.
      sharing: who shares with whom, who is dropped and who is slim; None for a dense model.
      context: positions of every text.
      batch: texts.
      itemsize: bytes of a key's or value's number in the cache.
    """
    width, group, slots = config.hidden_size, config.heads_per_unit, cache_slots(config, context)
    mlp = 3 * config.num_layers * width * config.intermediate_size

    def costs(count: int, rest: int) -> Costs:
        return Costs(
            cache_bytes=count * slots * batch * itemsize,
            projections=2 * count * width * (1 + group),
            attention=2 * count * slots * group,
            rest=rest,
        )

    rest, runs = 2 * (mlp + config.vocab_size * width), columns(head_shapes(config, sharing))
    return Running(
        context=context,
        batch=batch,
        dense=costs(columns(head_shapes(config)), rest),
        model=costs(runs, rest),
        padding=costs(runs - _kept_columns(config, sharing), 0),
    )


def _kept_columns(config: LlamaConfig, sharing: SharingMap | None) -> int:
    """Columns of keys and values that are neither dropped nor cut."""
    if sharing is None or sharing.widths is None:
        return columns(head_shapes(config, sharing))
    kept_lu = sharing.widths.qk.sum(axis=2) + sharing.widths.vo.sum(axis=2)
    return int(np.sum(kept_lu[~sharing.dropped]))
