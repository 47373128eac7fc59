"""What is left of every unit: so many value columns and some rotary pairs, or another unit's weights in their place."""

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
      donor: int32 [L, U], flat index of the unit whose q, k and v are used: its own, but for receivers. Receivers and
        donors are whole.
    """

    rank: np.ndarray
    pairs: np.ndarray
    donor: np.ndarray

    @classmethod
    def all_of(cls, config: LlamaConfig) -> "Kept":
        """A dense model's units."""
        units = (config.num_layers, config.num_kv_heads)
        return cls.whole(*units, pair_sizes(config))

    @classmethod
    def whole(cls, layers: int, units: int, size_p: np.ndarray) -> "Kept":
        """Units of which nothing is cut."""
        shape = (layers, units)
        rank = np.full(shape, size_p.sum(), np.int32)
        return cls(rank, np.ones((*shape, len(size_p)), bool), np.arange(rank.size, dtype=np.int32).reshape(shape))

    @property
    def dropped(self) -> np.ndarray:
        """bool [L, U]: nothing is left of the unit."""
        return self.rank == 0

    @property
    def receives(self) -> np.ndarray:
        """bool [L, U]: the unit uses another's weights."""
        return self.donor != np.arange(self.donor.size).reshape(self.donor.shape)

    @property
    def tied(self) -> np.ndarray:
        """bool [L, U]: the unit is a receiver or a donor, of which nothing can be cut any more."""
        tied_n = self.receives.ravel()
        tied_n[self.donor[self.receives]] = True
        return tied_n.reshape(self.donor.shape)

    def is_whole(self, size_p: np.ndarray) -> np.ndarray:
        """bool [L, U]: nothing of the unit is cut."""
        return self.columns(size_p) == 2 * size_p.sum()

    def columns(self, size_p: np.ndarray) -> np.ndarray:
        """int64 [L, U], columns of values, and of queries and keys, that are left of each unit, of 2 H."""
        return self.rank + self.pairs @ size_p


def pair_sizes(config: LlamaConfig) -> np.ndarray:
    """int64 [P], columns of each entry of `Kept.pairs`: 2 of a rotary pair, 1 of a column that does not turn."""
    turning = config.rotary_dim // 2
    return np.repeat([2, 1], [turning, config.head_dim - 2 * turning])
