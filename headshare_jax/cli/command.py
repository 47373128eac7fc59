"""What all commands have in common: one result, shown as text or as JSON, and progress on standard error."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from headshare_jax.convert.cache import cache_directory

Source = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="SRC", help="Model: native or Hugging Face folder, .gguf file, or hub id (owner/model)."),
]
Destination = Annotated[
    tyro.conf.Positional[str], tyro.conf.arg(metavar="DST", help="Folder to make for the new model.")
]
Overwrite = Annotated[bool, tyro.conf.arg(help="Replace outputs that exist.")]
ComputeDtype = Annotated[str, tyro.conf.arg(help="Type to compute in: float32 or bfloat16.")]

_errors = Console(stderr=True)
SECONDS_BETWEEN_LINES = 20.0


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its fields are its arguments.

    Attributes:
      json: print one JSON object on standard output and nothing else there.
    """

    json: Annotated[bool, tyro.conf.arg(help="Print one JSON object on standard output, and nothing else there.")] = (
        False
    )

    def execute(self) -> None:
        """Runs the command and prints its result."""
        result = self.run()
        if self.json:
            json.dump(plain(result), sys.stdout, allow_nan=False)
            print()
        else:
            console = Console()
            for part in self.show(result):
                console.print(part)

    def run(self) -> dict[str, Any]:
        """Does the work; returns plain data."""
        raise NotImplementedError

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        """The result as a person reads it."""
        raise NotImplementedError


def say(message: str) -> None:
    """Tells on standard error what is being done."""
    _errors.print(message, style="dim", highlight=False)


def keep_compiled() -> None:
    """Keeps what is compiled in the cache folder, so that later commands start without compiling.

    A folder that the user gave JAX stays in force, and where none can be made nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_directory() / "compiled"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields the function to call with the steps done and in all.

    Where a bar cannot be drawn over and over, as in a log, a line tells now and then.
    """
    if not _errors.is_terminal:
        tell = _line_now_and_then()
        yield lambda done, total: tell(done, total, label)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_errors, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def progress_with_text() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar with a text that changes; yields the function to call with the steps done, in all, and the text.

    It appears with the first call, so that work that is refused before it begins shows none. In a log, lines as of
    `progress`.
    """
    if not _errors.is_terminal:
        yield _line_now_and_then()
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with ExitStack() as shown:
        bar = Progress(*columns, console=_errors)
        task = bar.add_task("", total=None)

        def show(done: int, total: int, text: str) -> None:
            if not bar.live.is_started:
                shown.enter_context(bar)
            bar.update(task, completed=done, total=total, description=text)

        yield show


def _line_now_and_then() -> Callable[[int, int, str], None]:
    told = time.monotonic()

    def show(done: int, total: int, text: str) -> None:
        nonlocal told
        if text and time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            say(f"{text}: {done} of {total}")

    return show


def megabytes(count: int) -> str:
    """Bytes in MB (10^6), to one decimal."""
    return f"{count / 1e6:,.1f} MB"


def plain(value: Any) -> Any:
    """JSON has no infinities: they become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
