"""FP8 weights with scales, in safetensors files, read as the numbers that they stand for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from headshare_jax.convert.keys import Cut
from headshare_jax.convert.safetensors_files import FLOATS, SafetensorsReader
from headshare_jax.convert.tensor_files import TensorInfo
from headshare_jax.errors import HeadshareError

# What stands beside a weight: its scales, and those of activations and of the cache, which quantise no weights.
_SCALES = (".weight_scale_inv", ".weight_scale")
_OTHER_SCALES = (".activation_scale", ".input_scale", ".input_scale_ub", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class _Weight:
    """The scales of an FP8 matrix.

    Attributes:
      scale: the tensor that holds them.
      scale_info: of that.
      steps: how many rows, and how many columns, have a scale in common.
    """

    scale: str
    scale_info: TensorInfo
    steps: tuple[int, int]


class Fp8Reader(SafetensorsReader):
    """Tensors of safetensors files, of which some are FP8 numbers (E4M3) with scales of blocks, rows or matrices.

    Products with the scales are in float32, and then rounded to the type of the model.
    """

    quantised_as = "fp8"

    def __init__(self, files: list[Path], fields: Mapping[str, Any]):
        """Takes the files and the model's `config.json`."""
        super().__init__(files)
        name = str(fields.get("dtype") or fields.get("torch_dtype")).removeprefix("torch.")
        types = {str(dtype): dtype for dtype in FLOATS.values()}
        self._dtype = types.get(name, np.dtype(ml_dtypes.bfloat16))
        self._block = _block(fields["quantization_config"])
        self._weights: dict[str, _Weight] = {}

    def infos(self) -> tuple[dict[str, TensorInfo], list[str]]:
        found, problems = super().infos()
        scales = {name: info for name, info in found.items() if name.endswith(_SCALES)}
        for scale in scales:
            name = f"{scale.rpartition('.')[0]}.weight"
            entry = self.entries.get(name)
            if entry is not None and entry.type == "F8_E4M3" and len(entry.shape) == 2:
                self._weights[name] = _Weight(scale, scales[scale], self._steps(entry.shape, scales[scale].shape))
        for name, weight in self._weights.items():
            shape, info = found[name].shape, weight.scale_info
            if info.dtype is None or math.prod(info.shape) != math.prod(_grid(shape, weight.steps)):
                problems.append(f"{weight.scale} does not hold a scale for every part of {name}")
            found[name] = TensorInfo(shape, self._dtype, found[name].file)
        return {name: info for name, info in found.items() if not name.endswith((*_SCALES, *_OTHER_SCALES))}, problems

    def read(self, info: TensorInfo, name: str, cut: Cut | None = None) -> np.ndarray:
        if name not in self._weights:
            return super().read(info, name, cut)
        weight = self._weights[name]
        scale_ab = super().read(weight.scale_info, weight.scale).reshape(_grid(info.shape, weight.steps))
        places = [np.arange(size) // step for size, step in zip(info.shape, weight.steps, strict=True)]
        if cut is not None:
            places[cut.axis] = Cut(0, cut.slices).of(places[cut.axis])
        values = super().read(info, name, cut).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        values *= scale_ab.astype(np.float32)[np.ix_(*places)]
        return values.astype(self._dtype)

    def _steps(self, shape: Sequence[int], scales: Sequence[int]) -> tuple[int, int]:
        if self._block is not None and len(scales) == 2:
            return self._block
        return (1 if math.prod(scales) == shape[0] else shape[0], shape[1])


def _grid(shape: Sequence[int], steps: tuple[int, int]) -> tuple[int, ...]:
    """How many scales a matrix has along its axes."""
    return tuple(-(-size // step) for size, step in zip(shape, steps, strict=True))


def _block(scheme: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks that have a scale each; None for scales of rows or of whole matrices.

    Raises:
      HeadshareError: they are no two numbers.
    """
    groups = scheme.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    sizes = [scheme.get("weight_block_size"), *(_weights(group).get("block_structure") for group in groups)]
    size = next((size for size in sizes if size), None)
    match size:
        case None:
            return None
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise HeadshareError(f"The blocks of FP8 weights in config.json must be two numbers, not {size!r:.99}.")


def _weights(group: Any) -> dict[str, Any]:
    weights = group.get("weights") if isinstance(group, dict) else None
    return weights if isinstance(weights, dict) else {}
