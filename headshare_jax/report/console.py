"""What people read, on a terminal or through a pipe; names from outside are text there, never markup."""

import copy
import io
import sys

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
