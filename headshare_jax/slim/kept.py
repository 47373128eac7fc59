"""What slimming leaves of every unit: so many value columns, and some rotary pairs of its queries and keys."""

from dataclasses import dataclass

import numpy as np

from headshare_jax.config import LlamaConfig


@dataclass(frozen=True)
class Kept:
    """What is left of every unit.

    Attributes:
      rank: int32 [L, U], value columns, the first of H; 0 for a unit that is dropped.
      pairs: bool [L, U, P], P = H - R / 2: rotary pairs and then single columns that do not turn, R = `rotary_dim`;
        none for a unit that is dropped.
    """

    rank: np.ndarray
    pairs: np.ndarray

    @classmethod
    def all_of(cls, config: LlamaConfig) -> "Kept":
        """A dense model's units."""
        units = (config.num_layers, config.num_kv_heads)
        return cls(np.full(units, config.head_dim, np.int32), np.ones((*units, len(pair_sizes(config))), bool))

    @property
    def dropped(self) -> np.ndarray:
        """bool [L, U]: nothing is left of the unit."""
        return self.rank == 0

    def columns(self, size_p: np.ndarray) -> np.ndarray:
        """int64 [L, U], columns of values, and of queries and keys, that are left of each unit, of 2 H."""
        return self.rank + self.pairs @ size_p


def pair_sizes(config: LlamaConfig) -> np.ndarray:
    """int64 [P], columns of each entry of `Kept.pairs`: 2 of a rotary pair, 1 of a column that does not turn."""
    turning = config.rotary_dim // 2
    return np.repeat([2, 1], [turning, config.head_dim - 2 * turning])
