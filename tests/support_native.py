"""Native checkpoints that someone forged: changed, and given the checksums of what they became."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from headshare_jax.convert import native_array, native_document
from headshare_jax.convert.native_document import DOCUMENT, WEIGHTS
from headshare_jax.parameters import PARAMETERS


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a document, and has it sealed again."""
    document = json.loads((folder / DOCUMENT).read_text())
    (folder / DOCUMENT).unlink()
    change(document)
    native_document.write(folder, {key: document[key] for key in document if key not in ("files", "checksum")})


def replace_array(folder: Path, name: str, value: np.ndarray) -> None:
    """Stores other values in place of an array's."""
    path = folder / WEIGHTS / name
    shutil.rmtree(path)
    layered = name in PARAMETERS and PARAMETERS[name].layered
    sums = native_array.write(
        path, native_array.Deferred(value.shape, value.dtype, layered, [(slice(0, len(value)), lambda: value)])
    )
    forge(folder, lambda document: document[native_document.SUMS].update({name: " ".join(sums)}))
