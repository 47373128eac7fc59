"""Progress of long work, on standard error: a bar on a terminal, and in a log a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 20.0
_COLUMNS = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
_errors = Console(stderr=True)
# Called with the steps done, in all, and a text.
Show = Callable[[int, int, str], None]


def say(message: str) -> None:
    """Tells on standard error what is being done."""
    _errors.print(message, style="dim", highlight=False)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with a fixed text that goes away; yields the function to call with the steps done and in all."""
    with _bar(TextColumn("{task.description}"), *_COLUMNS, transient=True) as show:
        yield lambda done, total: show(done, total, label)


def progress_with_text() -> AbstractContextManager[Show]:
    """A bar with a text that changes; yields the function to call with the steps done, in all, and the text."""
    return _bar(*_COLUMNS, TextColumn("{task.description}"), transient=False)


@contextmanager
def _bar(*columns: ProgressColumn, transient: bool) -> Iterator[Show]:
    """A bar that appears with the first call, so that work that is refused before it begins shows none."""
    if not _errors.is_terminal:
        yield _line_now_and_then()
        return
    with ExitStack() as shown:
        bar = Progress(*columns, console=_errors, transient=transient)
        task = bar.add_task("", total=None)

        def show(done: int, total: int, text: str) -> None:
            if not bar.live.is_started:
                shown.enter_context(bar)
            bar.update(task, completed=done, total=total, description=text)

        yield show


def _line_now_and_then() -> Show:
    told = time.monotonic()

    def show(done: int, total: int, text: str) -> None:
        nonlocal told
        if text and time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            say(f"{text}: {done} of {total}")

    return show
