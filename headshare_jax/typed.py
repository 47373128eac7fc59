"""Plain arguments of public functions: a wrong type is refused by name, before anything is done with it."""

import inspect
import numbers
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, get_args

import numpy as np

from headshare_jax.errors import HeadshareError

P = ParamSpec("P")
R = TypeVar("R")

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    Path: "a path",
    NoneType: "None",
}


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Checks the arguments that are annotated with plain types, and with None; others are left to the function.

    Whole numbers are no `bool` and no `float`; NumPy's scalars count as Python's, and become those.
    """
    signature = inspect.signature(function)
    plain = {name: kinds for name, each in signature.parameters.items() if (kinds := _plain(each.annotation))}

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name in bound.arguments.keys() & plain.keys():
            bound.arguments[name] = _checked(name, bound.arguments[name], plain[name])
        return function(*bound.args, **bound.kwargs)

    return checked


def check_fields(settings: Any) -> None:
    """The same for the fields of a dataclass; raises HeadshareError."""
    for field in fields(settings):
        if kinds := _plain(field.type):
            _checked(field.name, getattr(settings, field.name), kinds)


def _plain(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, if all of them are plain."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return kinds if all(isinstance(kind, type) and kind in _WORDS for kind in kinds) else ()


def _checked(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    if isinstance(value, bool | np.bool_):
        if bool in kinds:
            return bool(value)
    elif int in kinds and isinstance(value, numbers.Integral):
        return int(value)
    elif float in kinds and isinstance(value, numbers.Real):
        return float(value)
    elif isinstance(value, tuple(kind for kind in kinds if kind in (str, Path, NoneType))) or (
        # A path in a bucket.
        Path in kinds and hasattr(value, "protocol")
    ):
        return value
    words = " or ".join(_WORDS[kind] for kind in kinds)
    raise HeadshareError(f"{name} must be {words}, not {value!r:.99}.", option=name)
