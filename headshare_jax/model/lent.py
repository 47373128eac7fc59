"""A model on the devices of several processes, lent to the first of them to read."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.model.gather import on_host
from headshare_jax.model.llama import Llama
from headshare_jax.processes.agreement import from_first
from headshare_jax.sharing import finite
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource, read_held
from headshare_jax.sharing.view import View, cast


@contextmanager
def lent(source: WeightSource, dtype: str | None = None) -> Iterator[WeightSource | None]:
    """A source that the first process reads in its block as if it had all of it; the other processes get None.

    All processes must come here together. The others help to bring every slice that the first one reads to its host,
    and come to their blocks when its own is over.

    Args:
      source: a model, or views of one.
      dtype: type to give the parameters in; by default the source's own. They are rounded where they lie.
    """
    model = source
    while isinstance(model, View):
        model = model.base
    if jax.process_count() == 1 or not isinstance(model, Llama):
        yield cast(source, dtype) if jax.process_index() == 0 else None
        return
    if jax.process_index() > 0:
        while asked := json.loads(from_first("lent", "")):
            on_host(model.array(asked["name"]), asked["rows"], dtype)
        yield None
        return
    try:
        yield cast(_over(source, _Lent(model, dtype)), dtype)
    finally:
        from_first("lent", "null")


def _over(source: WeightSource, base: WeightSource) -> WeightSource:
    """The same views over another base."""
    return source.over(_over(source.base, base)) if isinstance(source, View) else base


class _Lent:
    """What the first process reads."""

    def __init__(self, model: Llama, dtype: str | None):
        self._model, self._dtype = model, dtype

    @property
    def config(self) -> LlamaConfig:
        return self._model.config

    @property
    def sharing(self) -> SharingMap | None:
        return self._model.sharing

    def dtype(self, name: str) -> np.dtype:
        return self._model.dtype(name) if self._dtype is None else np.dtype(jax.numpy.dtype(self._dtype))

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        def asked(stored: int | np.ndarray | None) -> np.ndarray:
            from_first("lent", json.dumps({"name": name, "rows": np.asarray(stored).tolist()}))
            found = on_host(self._model.array(name), stored, self._dtype)
            what = finite.slice_name(name, layer)
            return finite.check_weights(found, what, "the model" if self._dtype is None else f"it, as {self._dtype},")

        return read_held(self, name, layer, rows, asked)
