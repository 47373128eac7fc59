"""Finite or refused: what must hold no NaN and no infinity is looked at here, at the speed of memory."""

import numpy as np

from headshare_jax.errors import HeadshareError


class NotFinite(HeadshareError):  # noqa: N818 (what it says is what is)
    """Weights, or what is computed with them, hold NaN or infinities."""


# What makes computed values so, where weights are finite.
CAUSE = (
    "the model's weights are too large to compute with, as of one that is damaged or was badly trained or converted."
)
# By the bytes of a number: signed and unsigned integers of its size.
_INTEGERS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}


def is_finite(values: np.ndarray) -> bool:
    """Whether float32, float16 or bfloat16 values hold no NaN and no infinity.

    They are compared as integers, of which those of infinity and NaN are the largest of either sign: NumPy's own test
    is tens of times slower for types of 16 bits.
    """
    signed, unsigned = _INTEGERS[values.dtype.itemsize]
    if not values.size:
        return True
    infinite = int(np.array(np.inf, values.dtype).view(unsigned))
    negative = infinite | 1 << 8 * values.dtype.itemsize - 1
    return bool(values.view(signed).max() < infinite and values.view(unsigned).max() < negative)


def said(values: np.ndarray) -> str:
    """How many of some values are NaN and how many infinite, in words."""
    values = np.asarray(values, np.float32)
    nans, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    parts = [f"{count:,} {what}" for count, what in ((nans, "NaN"), (infinite, "infinite")) if count]
    return f"{' and '.join(parts)} of {values.size:,} values"


def slice_name(name: str, layer: int | None) -> str:
    """What a message calls a parameter's slice."""
    return name if layer is None else f"{name} of layer {layer}"


def check_weights(values: np.ndarray, name: str, place: object) -> np.ndarray:
    """Weights as they are.

    Args:
      values: as for `is_finite`.
      name: what a message is to call them.
      place: the file or folder that they lie in, or another name of the model.

    Raises:
      NotFinite: there are NaN or infinities; it says how many.
    """
    if not is_finite(values):
        raise NotFinite(f"{name} in {place} holds {said(values)}: the model is damaged; get or make it again.")
    return values


def check_computed(what: str, *values: np.ndarray) -> None:
    """Raises NotFinite, which says what they are, if some computed values are NaN or infinite."""
    if not all(np.isfinite(array).all() for array in values):
        raise NotFinite(f"{what} are NaN or infinite: {CAUSE}")
