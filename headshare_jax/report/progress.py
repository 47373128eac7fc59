"""Progress of long work, on standard error: a bar with the time left on a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from headshare_jax.report.console import console

SECONDS_BETWEEN_LINES = 20.0
# From then on there is an estimate of all that is to be done, which is told if that is longer than a bar's worth.
SECONDS_TO_ESTIMATE, SECONDS_WORTH_TELLING = 4.0, 10.0
_errors = console(stderr=True)
_TEXT = TextColumn("{task.description}", markup=False)
# Called with the steps done, in all, and a text.
Show = Callable[[int, int, str], None]
Step = Callable[[int, int], None]


def say(message: str) -> None:
    """Tells on standard error what is being done."""
    _errors.print(message, style="dim", highlight=False, soft_wrap=True)


class Course:
    """Work in phases of which is known how much each costs, in any unit: one bar for all of them.

    The time left follows from what the work so far took. Early on, all of it is told once, in a log too.
    """

    def __init__(self, costs: Mapping[str, float], show: Show):
        self._costs, self._show = dict(costs), show
        self._done = 0.0
        self._begun: tuple[float, float] | None = None
        self._told = False

    @contextmanager
    def phase(self, label: str, part: Callable[[float], float] = lambda done: done) -> Iterator[Step]:
        """The next phase; yields the function to call with its steps done and in all.

        Args:
          label: of the phase.
          part: what part of its cost a part of its steps is, where they do not all cost the same.
        """
        started, before, cost = time.monotonic(), self._done, self._costs.get(label, 0.0)

        def step(done: int, total: int) -> None:
            self._done = before + cost * part(done / max(total, 1))
            self._show(round(1000 * self._part), 1000, f"{label} {done} of {total}{self._left()}")

        yield step
        if time.monotonic() - started < 0.5:
            # It was there already, and says nothing of how long the others take.
            self._costs[label], self._done, self._begun = 0.0, before, None
        else:
            self._done = before + cost

    @property
    def _part(self) -> float:
        return min(1.0, self._done / (sum(self._costs.values()) or 1.0))

    def _left(self) -> str:
        """The time left as a text, once it can be told; the first step is left out, for it compiles too."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = (now, self._done)
        began, done = self._begun
        if now - began < SECONDS_TO_ESTIMATE or self._done <= done:
            return ""
        seconds = (now - began) / (self._done - done) * (sum(self._costs.values()) - self._done)
        if not self._told and seconds > SECONDS_WORTH_TELLING:
            say(f"about {spoken(seconds + now - began)} in all")
        self._told = True
        return f", about {spoken(seconds)} left"


@contextmanager
def course(costs: Mapping[str, float]) -> Iterator[Course]:
    """A bar for work in phases; see `Course`."""
    with _bar(_TEXT, BarColumn(), transient=True) as show:
        yield Course(costs, show)


@contextmanager
def progress(label: str) -> Iterator[Step]:
    """A bar for work in one phase; yields the function to call with the steps done and in all."""
    with course({label: 1.0}) as bar, bar.phase(label) as step:
        yield step


def progress_with_text() -> AbstractContextManager[Show]:
    """A bar with a text that changes; yields the function to call with the steps done, in all, and the text."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    return _bar(*columns, _TEXT, transient=False)


def spoken(seconds: float) -> str:
    """A time as a person says it: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
            # Names of files can look like markup.
            bar.update(task, completed=done, total=total, description=text.replace("[", r"\["))

        yield show


def _line_now_and_then() -> Show:
    told = time.monotonic()

    def show(done: int, total: int, text: str) -> None:
        nonlocal told
        if text and time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            say(f"{100 * done // max(total, 1)} %: {text}")

    return show
