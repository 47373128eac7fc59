"""A checkpoint of a PostShare run, read as the model that the run would end with there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.convert import checkpoint_document, storage
from headshare_jax.convert.checkpoint_document import ARRAYS
from headshare_jax.convert.stored_tree import StoredTree
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PARAMETERS, parameter_names
from headshare_jax.sharing import finite
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource, read_heads, runs, stored_shape
from headshare_jax.sharing.view import SharedView, View

# In a run's folder.
CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
# Of what was read, so much is kept for a next layer in the same chunk.
_CACHE_BYTES = 256 * 2**20


def is_here(path: Path) -> bool:
    """Whether a folder is a run's, or one of its checkpoints."""
    return checkpoint_document.is_whole(path) or (
        storage.is_file(path / CONFIG) and storage.is_folder(path / CHECKPOINTS)
    )


def chosen(path: Path, step: int | None = None) -> Path:
    """The folder of a run's checkpoint: of a step, or the newest.

    Raises:
      HeadshareError: there is none.
    """
    if checkpoint_document.is_whole(path):
        return path
    if not is_here(path):
        raise HeadshareError(f"{path} is not the folder of a run, which alone has checkpoints of steps.", option="step")
    folder = path / CHECKPOINTS
    steps = checkpoint_document.whole_steps(folder)
    if not steps:
        raise HeadshareError(f"{path} has no checkpoint that can be read; resume the run to make one.")
    if step is not None and step not in steps:
        raise HeadshareError(f"{path} has no checkpoint of step {step}, only of {', '.join(map(str, steps))}.")
    return folder / str(steps[-1] if step is None else step)


class RunCheckpoint(View):
    """A checkpoint of a run as a `WeightSource`: shared by the run's map, without a refit.

    Attributes:
      path: its folder.
      places: the folders of the arrays that it is read from, without what else training needs.
      step: of the run.
      model: the name of the dense model that the run began with, which has the tokenizer.
      final_dtype: the type that the run's own model would be written in; what trains is stored in float32.
      provenance: plain data: the dense model, and the step.

    Raises:
      HeadshareError: it is damaged.
    """

    def __init__(self, path: Path):
        document = checkpoint_document.read(path)
        self.path, self.model, self.final_dtype = path, str(document["model"]), str(document["dtype"])
        self.step = int(document["step"])
        self.provenance: dict[str, Any] = {"source": self.model, "postshare": {"step": self.step}}
        sharing = SharingMap.from_json(document["map"])
        dense = document["kind"] == "align"
        stored = _Stored(path, document, None if dense else sharing)
        self.places = stored.places()
        # Whether the map is for these weights was looked at when the run began.
        super().__init__(SharedView(stored, sharing, check_source=False) if dense else stored)


class _Stored:
    """The model as a stage trains it."""

    def __init__(self, path: Path, document: dict[str, Any], sharing: SharingMap | None):
        self.path, self.sharing = path, sharing
        self._reading, self._whole = Lock(), dict[str, np.ndarray]()
        self.config = LlamaConfig.from_json(document["config"])
        state, frozen = StoredTree(path / ARRAYS, document["seals"], cache_bytes=_CACHE_BYTES), document["frozen_in"]
        self._trees = {name: (state, f"params.{name}") for name in parameter_names(self.config)}
        if document["frozen"]:
            tree = StoredTree(path.parent / frozen["folder"], frozen["seals"], cache_bytes=_CACHE_BYTES)
            self._trees |= {name: (tree, name) for name in document["frozen"]}
        for name, (tree, stored) in self._trees.items():
            if tree.shape(stored) != stored_shape(self.config, name, sharing):
                raise HeadshareError(f"{path} is damaged: {name} has shape {list(tree.shape(stored))}.")

    def places(self) -> list[Path]:
        """The folders of its arrays."""
        return [tree.folder / stored for tree, stored in self._trees.values()]

    def dtype(self, name: str) -> np.dtype:
        tree, stored = self._trees[name]
        return tree.dtype(stored)

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        tree, stored = self._trees[name]

        def checked(values: np.ndarray) -> np.ndarray:
            return finite.check_weights(values, finite.slice_name(name, layer), self.path)

        if layer is None:
            return self._table(name, rows, lambda: checked(tree.read(stored, [()])[0]))
        if PARAMETERS[name].pool is None:
            return checked(tree.read(stored, [(slice(layer, layer + 1),)])[0][0])
        return read_heads(self, name, layer, rows, lambda some: checked(_rows(tree, stored, some)))

    def _table(self, name: str, rows: Sequence[int] | None, read: Callable[[], np.ndarray]) -> np.ndarray:
        """A parameter without layers, or rows of it; all of it is kept until the last ones were asked for.

        A chunk may have a part of every row, so that reading a few takes as long as reading all.
        """
        with self._reading:
            values = self._whole[name] if name in self._whole else read()
            keeps = rows is not None and rows[-1] + 1 < len(values)
            self._whole = {name: values} if keeps else {}
        return values if rows is None else values[np.asarray(rows)]


def _rows(tree: StoredTree, name: str, rows: np.ndarray) -> np.ndarray:
    """Rows of an array's leading axis, int [n]; those that lie side by side are read together."""
    wanted, place = np.unique(rows, return_inverse=True)
    return np.concatenate(tree.read(name, [(run,) for run in runs(wanted)]))[place]


def dtype_of(source: WeightSource) -> str | None:
    """The type that a run's checkpoint is to be written in; None of any other source."""
    while isinstance(source, View) and not isinstance(source, RunCheckpoint):
        source = source.base
    return source.final_dtype if isinstance(source, RunCheckpoint) else None
