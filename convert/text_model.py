"""The text model inside a multimodal checkpoint: its tensors, by their names in a checkpoint of its own."""

import numpy as np

from headshare_jax.convert.keys import Cut
from headshare_jax.convert.tensor_files import TensorInfo, TensorReader

# What the names of the text model's tensors begin with, and with what a checkpoint of its own has them begin.
_PREFIXES = {
    "language_model.": "",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "lm_head.": "lm_head.",
}


class TextModelReader:
    """The text model's tensors; those of other parts of the model are left out."""

    def __init__(self, whole: TensorReader):
        self._whole = whole
        self._names: dict[str, str] = {}

    def infos(self) -> tuple[dict[str, TensorInfo], list[str]]:
        found, problems = self._whole.infos()
        for name in found:
            for theirs, own in _PREFIXES.items():
                if name.startswith(theirs):
                    self._names[own + name.removeprefix(theirs)] = name
        return {own: found[name] for own, name in self._names.items()}, problems

    def read(self, info: TensorInfo, name: str, cut: Cut | None = None) -> np.ndarray:
        return self._whole.read(info, self._names[name], cut)
