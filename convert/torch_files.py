"""PyTorch `.bin` checkpoints, read without running anything that is pickled in them."""

import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from headshare_jax.convert.keys import Cut
from headshare_jax.convert.tensor_files import TensorInfo
from headshare_jax.errors import HeadshareError

_FLOATS: dict[str, np.dtype[Any]] = {
    "torch.float32": np.dtype(np.float32),
    "torch.float16": np.dtype(np.float16),
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
}


# Pages of a mapped file count as memory once they are read, so after this many bytes it is mapped anew.
_MAPPED_BYTES = 64 * 2**20


class TorchReader:
    """Tensors of `.bin` files, opened with `weights_only`; needs PyTorch."""

    def __init__(self, files: list[Path]):
        self.files = files
        self._open: tuple[Path, dict[str, Any]] | None = None
        self._mapped = False
        self._bytes_read = 0

    def infos(self) -> tuple[dict[str, TensorInfo], list[str]]:
        found: dict[str, TensorInfo] = {}
        problems = []
        for path in self.files:
            for name, tensor in self._tensors(path).items():
                if name in found:
                    problems.append(f"{name} stands in both {found[name].file.name} and {path.name}")
                dtype = _FLOATS.get(str(tensor.dtype)) if str(tensor.layout) == "torch.strided" else None
                found[name] = TensorInfo(tuple(tensor.shape), dtype, path)
        return found, problems

    def read(self, info: TensorInfo, name: str, cut: Cut | None = None) -> np.ndarray:
        tensor = self._tensors(info.file)[name].detach().contiguous()
        if info.dtype == ml_dtypes.bfloat16:
            values: np.ndarray = tensor.view(_torch().uint16).numpy().view(ml_dtypes.bfloat16)
        else:
            values = tensor.numpy()
        found = values if cut is None else cut.of(values)
        self._bytes_read += found.nbytes
        return found

    def _tensors(self, path: Path) -> dict[str, Any]:
        """The file's tensors, mapped rather than read where its format allows; one file is open at a time."""
        if self._open is None or self._open[0] != path or (self._mapped and self._bytes_read > _MAPPED_BYTES):
            self._open = None
            tensors, self._mapped = _load(path)
            self._open, self._bytes_read = (path, tensors), 0
        return self._open[1]


def _load(path: Path) -> tuple[dict[str, Any], bool]:
    """A file's tensors, and whether they are mapped."""
    torch = _torch()
    mapped = True
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files from before PyTorch 1.6 cannot be mapped.
            mapped = False
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HeadshareError(
            f"{path} is corrupt, or holds objects that only running its pickled code could load, which is never done; "
            "convert it to safetensors where you trust it."
        ) from error
    except Exception as error:  # a damaged pickle shows itself in any way
        raise HeadshareError(f"{path} is truncated, corrupt or no PyTorch file ({error}); fetch it again.") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise HeadshareError(f"{path} does not hold a plain dictionary of tensors.")
    return tensors, mapped


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise HeadshareError(
            "Reading .bin weights needs PyTorch: pip install 'headshare-jax[torch]', or use a safetensors checkpoint."
        ) from error
    return torch
