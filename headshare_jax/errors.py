"""What bad input raises, what may go well later, and what pydantic refuses in its words."""

from collections.abc import Iterator
from contextlib import contextmanager

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


class TryAgain(HeadshareError):  # noqa: N818 -- what to do, as the command says it
    """What the same call can do later: a lock that another process holds, a hub that is not reached. Exit code 75."""


@contextmanager
def one_sentence(where: str) -> Iterator[None]:
    """Raises the first thing that pydantic finds wrong as a HeadshareError, e.g. `seed in the map must be ...`."""
    try:
        yield
    except ValidationError as error:
        raise HeadshareError(_sentence(error, where)) from error


def _sentence(error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    key, said = ".".join(map(str, first["loc"])), first["msg"]
    subject = f"{key} in {where}" if key else where[:1].upper() + where[1:]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{subject} is missing."
    if first["type"] == "json_invalid":
        return f"{subject} is not valid JSON ({first['ctx']['error']})."
    if not said.startswith("Input should"):
        return f"{subject} is not usable ({said})."
    return f"{subject} {said.replace('Input should', 'must')}, not {first['input']!r:.99}."
