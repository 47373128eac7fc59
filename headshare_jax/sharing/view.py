"""Views: sources that change another source as it is read, so that no changed model need ever be whole in memory."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Self

import ml_dtypes
import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PARAMETERS, layered_names, parameter_names, slice_shape
from headshare_jax.sharing import finite
from headshare_jax.sharing.columns import over_heads
from headshare_jax.sharing.ledger import described
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource, fingerprint
from headshare_jax.sharing.tie import DROPPED

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


class View:
    """A source that gives what another source gives; each kind of view changes some of it.

    Attributes:
      base: the source that is read.
    """

    def __init__(self, base: WeightSource):
        self.base = base

    def __repr__(self) -> str:
        return f"{type(self).__name__}({described(self)})"

    def over(self, base: WeightSource) -> Self:
        """The same change to another source."""
        view = copy(self)
        view.base = base
        return view

    @property
    def config(self) -> LlamaConfig:
        return self.base.config

    @property
    def sharing(self) -> SharingMap | None:
        return self.base.sharing

    def dtype(self, name: str) -> np.dtype:
        return self.base.dtype(name)

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        return self.base.read(name, layer, rows)


class SharedView(View):
    """A dense source as a map shares it: receivers read their donors' weights, dropped units and what is cut zeros.

    Examples:
      >>> view = hs.SharedView(hs.open_checkpoint("my-llama"), sharing)
      >>> hs.save(view, "my-llama-shared")
    """

    def __init__(self, base: WeightSource, sharing: SharingMap, *, check_source: bool = True):
        """Makes the view; no weights are read but for the check.

        Args:
          base: a dense source.
          sharing: who shares with whom, and who is dropped.
          check_source: compare the map's fingerprint with the source's weights, unless every receiver's are its donor's
            already; turn off for weights that were trained on.

        Raises:
          HeadshareError: the source already shares heads, or the map is for another model.
        """
        super().__init__(base)
        self._sharing = sharing
        if base.sharing is not None:
            raise HeadshareError(
                "The model already shares heads; give a dense one. Converting it to hf (in Python, `unshare`) writes "
                "every head out."
            )
        sharing.check_model(base.config)
        foreign = check_source and sharing.source is not None and sharing.source != fingerprint(base)
        if foreign and not self.changes_nothing():
            raise HeadshareError(
                "The map was made for other weights: its source fingerprint is not this model's; make a map for this "
                'model with a ratio, or set "source" to null in the map to use its pairs all the same.'
            )

    @property
    def sharing(self) -> SharingMap:
        return self._sharing

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        projection = PARAMETERS[name].pool
        if layer is None or projection is None:
            return self.base.read(name, layer, rows)
        values = self._read_heads(name, projection, layer, rows)
        if self.sharing.widths is None:
            return values
        kept_nh = self.sharing.kept_columns(projection)[layer]
        kept_nh = kept_nh if rows is None else kept_nh[list(rows)]
        return values if kept_nh.all() else np.where(over_heads(name, kept_nh), values, values.dtype.type(0))

    def _read_heads(self, name: str, projection: str, layer: int, rows: Sequence[int] | None) -> np.ndarray:
        """Heads as `read` gives them, with all of their columns."""
        head_n = self.sharing.head_donor(projection)[layer]
        per_layer = len(head_n)
        head_n = head_n if rows is None else head_n[list(rows)]
        layer_n = np.where(head_n == DROPPED, DROPPED, head_n // per_layer)
        if (layer_n == layer).all() and rows is None and len(np.unique(head_n)) == per_layer:
            return self.base.read(name, layer)
        values = np.zeros((len(head_n), *slice_shape(self.config, name)[1:]), self.dtype(name))
        for donor_layer in np.unique(layer_n[layer_n != DROPPED]):
            mine = layer_n == donor_layer
            wanted, place = np.unique(head_n[mine] % per_layer, return_inverse=True)
            values[mine] = self.base.read(name, int(donor_layer), wanted.tolist())[place]
        return values

    def changes_nothing(self) -> bool:
        """Whether receivers hold their donors' weights, and dropped units zeros, as a dense export has them."""
        return all(
            np.array_equal(self.base.read(name, layer), self.read(name, layer))
            for name in layered_names(self.config)
            if PARAMETERS[name].pool in tuple(self.sharing.pooled)
            for layer in range(self.config.num_layers)
        )


class DenseView(View):
    """A shared source written out: every head has weights of its own, a dropped unit's are zeros."""

    @property
    def sharing(self) -> None:
        return None


class ReplacedView(View):
    """A source with some layers' slices of some parameters replaced, as a refit does with output weights.

    Attributes:
      values: new slices, arrays shaped as `read` gives them, by parameter and layer; their type is the parameter's own.
    """

    def __init__(self, base: WeightSource, values: Mapping[tuple[str, int], Any]):
        super().__init__(base)
        self.values = values

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        value = None if layer is None else self.values.get((name, layer))
        if value is None:
            return self.base.read(name, layer, rows)
        return value if rows is None else value[list(rows)]


class CastView(View):
    """A source with every parameter rounded to another type as it is read."""

    def __init__(self, base: WeightSource, dtype: str):
        """Makes the view. Raises HeadshareError if `dtype` is none of `DTYPES`."""
        super().__init__(base)
        if dtype not in DTYPES:
            raise HeadshareError(f"The type {dtype!r} is not one of {', '.join(DTYPES)}.")
        self._dtype = DTYPES[dtype]

    def dtype(self, name: str) -> np.dtype:
        return self._dtype

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        values = self.base.read(name, layer, rows)
        with np.errstate(over="ignore"):
            rounded = values.astype(self._dtype, copy=False)
        if rounded is not values and not finite.is_finite(rounded):
            where = finite.slice_name(name, layer)
            largest = np.abs(finite.check_weights(values, where, "the model").astype(np.float32)).max()
            raise finite.NotFinite(
                f"{where} does not fit {self._dtype}, which makes {finite.said(rounded)} of it (the largest is "
                f"{largest:.3g}); choose a type of larger range.",
                option="dtype",
            )
        return rounded


class WatchedView(View):
    """A source that tells how much of it has been read, in slices of parameters, and how many there are."""

    def __init__(self, base: WeightSource, progress: Callable[[int, int], None]):
        super().__init__(base)
        layered, config = layered_names(base.config), base.config
        self._total = len(parameter_names(config)) + (config.num_layers - 1) * len(layered)
        self._progress, self._read = progress, set[tuple[str, int | None]]()

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        values = self.base.read(name, layer, rows)
        self._read.add((name, layer))
        self._progress(len(self._read), self._total)
        return values


def cast(source: WeightSource, dtype: str | None) -> WeightSource:
    """The source rounded to a type (see `CastView`); the source itself for None."""
    return source if dtype is None else CastView(source, dtype)
