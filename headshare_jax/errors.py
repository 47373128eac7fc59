"""What bad input raises, what may go well later, and what pydantic refuses in its words."""

import difflib
import errno
import os
import reprlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError


class HeadshareError(ValueError):
    """Bad input or an impossible request; the message names the thing and the remedy.

    The command prints the message alone and exits with code 2.

    Attributes:
      options: the arguments to change, by their Python names, where there are any; the command adds their flags to the
        message.
    """

    def __init__(self, message: str, *, option: str | tuple[str, ...] = ()):
        super().__init__(message)
        self.options = (option,) if isinstance(option, str) else option


# With which a process ends that can be started again as it was.
TRY_AGAIN = 75


class TryAgain(HeadshareError):  # noqa: N818 -- what to do, as the command says it
    """What the same call can do later: a lock that another process holds, a hub that is not reached. Exit code 75."""


class Unmet(HeadshareError):  # noqa: N818 -- of the amount, as the message says
    """A method cannot do without so much of a model."""


def explained(error: OSError) -> str:
    """One sentence on what the machine refused: of which file, and why."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    reason = "there is no room left on the disk" if full else error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"A file, or standard output, cannot be used: {reason}." if error.errno else f"{reason}."
    return f"{os.fsdecode(error.filename)[:200] or 'A file without a name'} cannot be used: {reason}."


# What YAML's references share would be written out again and again.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = (
    4,
    8,
    8,
    200,
    200,
    200,
)


def shown(value: Any) -> str:
    """Plain data as an error shows it, cut short."""
    return f"{_SHORT.repr(value):.99}"


@contextmanager
def one_sentence(where: str, known: Collection[str] = ()) -> Iterator[None]:
    """Raises the first thing that pydantic finds wrong as a HeadshareError, e.g. `seed in the map must be ...`.

    Args:
      where: what is read.
      known: keys that a misspelt one may have meant.
    """
    try:
        yield
    except ValidationError as error:
        raise HeadshareError(_sentence(error, where, known)) from error


def _sentence(error: ValidationError, where: str, known: Collection[str]) -> str:
    errors = error.errors(include_url=False)
    # A misspelt key also leaves one missing.
    first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
    key, said = ".".join(map(str, first["loc"])), first["msg"]
    subject = f"{key} in {where}" if key else where[:1].upper() + where[1:]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        if first["loc"][-1] in known:
            return f"{subject} has no place there; leave it out."
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        return f"{subject} is no known key{f'; did you mean {near[0]}?' if near else '.'}"
    if first["type"] == "missing":
        return f"{subject} is missing."
    if first["type"] == "json_invalid":
        return f"{subject} is not valid JSON ({first['ctx']['error']})."
    if not said.startswith("Input should"):
        return f"{subject} is not usable ({said})."
    return f"{subject} {said.replace('Input should', 'must')}, not {shown(first['input'])}."
