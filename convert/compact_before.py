"""Compact checkpoints as they were first written: a tensor for each pool, and an index of the rows that layers use.

`model.q_pool.weight` is [P, H, D], `model.q_pool.index` [layers, heads]. They are only read.
"""

from collections.abc import Sequence

import numpy as np

from headshare_jax import parameters
from headshare_jax.convert import keys
from headshare_jax.convert.tensor_files import TensorCheckpoint, TensorReader
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing.source import pool_index, read_heads, stored_shape

# [P, H, D] <-> [P, D, H]
_ROWS_TURNED = keys.Layout(lambda tensor, width: tensor.swapaxes(1, 2), lambda value, width: value.swapaxes(1, 2))
POOLS: keys.KeyTable = {
    "q_pool_pdh": keys.Key("model.q_pool.weight", _ROWS_TURNED),
    "k_pool_pdh": keys.Key("model.k_pool.weight", _ROWS_TURNED),
    "v_pool_pdh": keys.Key("model.v_pool.weight", _ROWS_TURNED),
    "o_pool_phd": keys.Key("model.o_pool.weight", keys.SAME),
    "q_bias_ph": keys.Key("model.q_pool.bias", keys.SAME),
    "k_bias_ph": keys.Key("model.k_pool.bias", keys.SAME),
    "v_bias_ph": keys.Key("model.v_pool.bias", keys.SAME),
}


def has_pools(reader: TensorReader) -> bool:
    """Whether a checkpoint is of this kind."""
    found, _ = reader.infos()
    return any(name.endswith("_pool.index") for name in found)


class PoolsCheckpoint(TensorCheckpoint):
    """Such a checkpoint on disk, as a `WeightSource`; reads no more than the heads of the layer asked for.

    Raises:
      HeadshareError: as `TensorCheckpoint`, or an index is not that of the map.
    """

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        projection = PARAMETERS[name].pool
        if layer is None or projection is None or projection not in self._pooled:
            return super().read(name, layer, rows)
        pool = POOLS[name].template

        def read_rows(stored: np.ndarray) -> np.ndarray:
            cut = keys.Cut(0, [slice(row, row + 1) for row in stored.tolist()])
            return keys.decode(POOLS, self.config, name, self.values(pool, cut))

        return read_heads(self, name, layer, rows, read_rows)

    @property
    def _pooled(self) -> str:
        return "" if self.sharing is None else self.sharing.pooled

    def _expected(self) -> dict[str, keys.Tensor]:
        dense = super()._expected().items()
        tensors = {name: tensor for name, tensor in dense if PARAMETERS[tensor.parts[0]].pool not in list(self._pooled)}
        for name in parameters.parameter_names(self.config):
            if PARAMETERS[name].pool in list(self._pooled):
                shape = stored_shape(self.config, name, self.sharing)
                shape = keys.encode(POOLS, self.config, name, np.broadcast_to(np.int8(0), shape)).shape
                tensors[POOLS[name].template] = keys.Tensor((name,), None, shape)
        # An index is no parameter's tensor.
        return tensors | {name: keys.Tensor((), None, index.shape) for name, index in self._indices().items()}

    def _contradictions(self) -> list[str]:
        wrong = [
            name
            for name, index in self._indices().items()
            if not np.array_equal(self.reader.read(self._infos[name], name), index)
        ]
        return super()._contradictions() + [f"{name} disagrees with headshare_map in config.json" for name in wrong]

    def _indices(self) -> dict[str, np.ndarray]:
        """The tensors that say which pool row each head of each layer is, int32 [L, heads], by name."""
        return {f"model.{p}_pool.index": pool_index(self.config, p, self.sharing) for p in self._pooled}
