"""What people read, on a terminal or through a pipe; names from outside are text there, never markup."""

import copy
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from rich.console import Console, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

# Columns of what is no terminal: nothing that is shown is as wide.
_UNBOUNDED = 100_000


def console(*, stderr: bool = False) -> Console:
    """A console that takes no text for markup or for the name of an emoji."""
    return Console(stderr=stderr, markup=False, emoji=False)


def show(part: RenderableType) -> None:
    """Shows a part of a result on standard output; what is no terminal gets whole lines, however long."""
    terminal = console()
    if terminal.is_terminal:
        terminal.print(part)
    else:
        print(_plain(part))


@contextmanager
def kept_for_result() -> Iterator[None]:
    """Sends to standard error meanwhile what libraries write to standard output past Python, such as gloo on CPUs.

    Nothing is to be shown in the block.
    """
    out, errors = _descriptor(sys.stdout), _descriptor(sys.stderr)
    if out is None or errors is None:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(out)
    os.dup2(errors, out)
    try:
        yield
    finally:
        os.dup2(kept, out)
        os.close(kept)


def _descriptor(stream: TextIO) -> int | None:
    """That of a stream; None of one in memory."""
    with suppress(io.UnsupportedOperation):
        return stream.fileno()
    return None


def _plain(part: RenderableType) -> str:
    if isinstance(part, (str, Text)):
        return str(part)
    if isinstance(part, Syntax):
        return part.code.rstrip("\n")
    lines, table = [], part
    if isinstance(part, Table):
        # They would be as narrow as the columns are.
        table = copy.copy(part)
        table.title = table.caption = None
        lines = [str(line) for line in (part.title, part.caption) if line is not None]
    file = _Encoded(sys.stdout.encoding or "utf-8")
    Console(file=file, width=_UNBOUNDED, color_system=None, markup=False, emoji=False).print(table)
    lines[1:1] = [line.rstrip() for line in file.getvalue().splitlines()]
    return "\n".join(lines)


class _Encoded(io.StringIO):
    """Text in memory that is drawn with the characters of an encoding."""

    encoding = ""

    def __init__(self, encoding: str):
        super().__init__()
        self.encoding = encoding
