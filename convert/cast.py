"""Storing weights in another type."""

from typing import Any

import ml_dtypes
import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import WeightSource
from headshare_jax.sharing import SharingMap

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def cast(source: WeightSource, dtype: str | None) -> WeightSource:
    """The source with every parameter rounded to `dtype` as it is read; the source itself for None.

    Raises:
      HeadshareError: `dtype` is none of `DTYPES`.
    """
    if dtype is None:
        return source
    if dtype not in DTYPES:
        raise HeadshareError(f"The type {dtype!r} is not one of {', '.join(DTYPES)}.")
    return _Cast(source, DTYPES[dtype])


class _Cast:
    def __init__(self, source: WeightSource, dtype: np.dtype[Any]):
        self._source, self._dtype = source, dtype

    @property
    def config(self) -> LlamaConfig:
        return self._source.config

    @property
    def sharing(self) -> SharingMap | None:
        return self._source.sharing

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._dtype

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        return self._source.read(name, layer).astype(self._dtype, copy=False)
