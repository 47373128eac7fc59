"""Kinds of values that options take: what each may be, and what is said of one that it may not be."""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, get_args

from headshare_jax.convert import FORMATS, storage
from headshare_jax.convert.gguf_writer import check_type
from headshare_jax.convert.text import check_name
from headshare_jax.errors import HeadshareError
from headshare_jax.matching.cosine import MATCH_FUNCTIONS
from headshare_jax.methods.table import METHODS
from headshare_jax.model.layer import REMAT_POLICIES
from headshare_jax.model.llama import COMPUTE_DTYPES
from headshare_jax.plan.estimate import STAGES
from headshare_jax.plan.topology import chip_of
from headshare_jax.sharing.tie import check_tie
from headshare_jax.sharing.view import DTYPES


class Kind(Protocol):
    """Stands in the annotation of a field, and checks every value that the field holds."""

    def checked(self, value: Any, name: str) -> Any:
        """The value as the command takes it; raises HeadshareError, which calls it `name`, if it is none."""


@dataclass(frozen=True)
class Within:
    """Finite numbers from `low` to `high`; `open_low` and `open_high` leave the ends out."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def checked(self, value: float, name: str) -> float:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        if above and below and math.isfinite(value):
            return value
        bounds = []
        if self.low > -math.inf:
            bounds.append(f"{'above' if self.open_low else 'at least'} {self.low}")
        if self.high < math.inf:
            bounds.append(f"{'below' if self.open_high else 'at most'} {self.high}")
        raise HeadshareError(f"{name} must be {' and '.join(bounds) or 'finite'}, not {value}.")


class OneOf:
    """Names, in capitals or not."""

    def __init__(self, *names: str):
        self.names = names

    def checked(self, value: str, name: str) -> str:
        if value.lower() in self.names:
            return value.lower()
        near = difflib.get_close_matches(value.lower(), self.names, 1)
        hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(self.names)}."
        raise HeadshareError(f"{name} does not take {value[:99]!r}; {hint}")


class _Readable:
    """A file that is there and can be read."""

    def checked(self, value: Path, name: str) -> Path:
        try:
            with storage.reached(value):
                is_file = value.is_file()
            if not is_file:
                found = "is no file" if value.exists() else "does not exist"
                raise HeadshareError(f"{name}: {str(value)[:200]} {found}; give a file.")
            value.open("rb").close()
        except OSError as error:
            raise HeadshareError(f"{name}: {str(value)[:200]} cannot be read: {error.strerror or error}.") from error
        return value


class _Unicode:
    """Text of characters; bytes that are none come from the command line as halves of surrogate pairs."""

    def checked(self, value: str, name: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise HeadshareError(f"{name} must be UTF-8, unlike byte {error.start + 1} of {value[:99]!r}.") from error
        return value


class Passing:
    """What a function of the library lets through."""

    def __init__(self, check: Callable[[str], Any]):
        self._check = check

    def checked(self, value: str, name: str) -> str:
        try:
            self._check(value)
        except HeadshareError as error:
            raise HeadshareError(f"{str(error).removesuffix('.')} ({name}).") from error
        return value


class Weighted:
    """The name of a text, perhaps with its weight before it: `2@wiki.txt`."""

    def checked(self, value: str, name: str) -> str:
        text, weight = weighted(value)
        if not 0 < weight < math.inf:
            raise HeadshareError(f"The weight of {text[:200]} must be finite and above 0, not {weight:g} ({name}).")
        Passing(check_name).checked(text, name)
        return value


def weighted(value: str) -> tuple[str, float]:
    """A text's name and its weight, 1 if none is given; a name that begins so itself needs one before it."""
    number, at, text = value.partition("@")
    try:
        return (text, float(number)) if at and text else (value, 1.0)
    except ValueError:
        return value, 1.0


_LARGEST = 2**31 - 1
Count = Annotated[int, Within(1, _LARGEST)]
Natural = Annotated[int, Within(0, _LARGEST)]
WindowLength = Annotated[int, Within(2, _LARGEST)]
Seed = Annotated[int, Within(0, 2**32 - 1)]
Ratio = Annotated[float, Within(0, 1, open_high=True)]
NotNegative = Annotated[float, Within(0)]
Words = Annotated[str, _Unicode()]
MeshSize = Annotated[int, Within(-1, _LARGEST)]
Stage = Annotated[str, OneOf(*STAGES)]
Remat = Annotated[str, OneOf(*REMAT_POLICIES)]
Topology = Annotated[str, Passing(chip_of)]
Budget = Annotated[float, Within(0, 1, open_low=True)]
Tie = Annotated[str, Passing(check_tie)]
MatchFunction = Annotated[str, OneOf(*MATCH_FUNCTIONS)]
MethodName = Annotated[str, OneOf(*METHODS)]
Format = Annotated[str, OneOf(*FORMATS)]
GgufType = Annotated[str, Passing(check_type)]
Dtype = Annotated[str, OneOf(*DTYPES)]
ComputeDtype = Annotated[str, OneOf(*COMPUTE_DTYPES)]
TextName = Annotated[str, Passing(check_name)]
WeightedText = Annotated[str, Weighted()]
InputFile = Annotated[Path, _Readable()]


def checked(annotation: Any, value: Any, name: str) -> Any:
    """A field's value as its annotation's kinds take it; several values are checked one by one.

    Raises:
      HeadshareError: an empty text, or a value that is none of its kind.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, tuple):
        return tuple(checked(annotation, each, name) for each in value)
    if isinstance(value, str) and not value.strip():
        raise HeadshareError(f"{name} is empty; give it a value.")
    for kind in _kinds(annotation):
        value = kind.checked(value, name)
    return value


def _kinds(annotation: Any) -> Iterator[Kind]:
    for part in getattr(annotation, "__metadata__", ()):
        if hasattr(part, "checked"):
            yield part
    for inner in get_args(annotation):
        yield from _kinds(inner)
