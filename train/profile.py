"""A trace of a few steps, for XProf."""

import shutil
import tempfile
from pathlib import Path
from typing import Self

import jax

from headshare_jax.errors import HeadshareError

STEPS = 3


def check_profile(first: int | None, steps: range) -> None:
    """Raises HeadshareError if the three steps to be traced, from `first` on, are not all among those that are left."""
    last = (first or 0) + STEPS - 1
    if first is not None and not (first in steps and last in steps):
        raise HeadshareError(
            f"Steps {first} to {last} are to be traced; the run does {steps.start} to {steps.stop - 1}; name others.",
            option="profile",
        )


class Profile:
    """Traces three steps in the first process, from step `first` on; none if that is None."""

    def __init__(self, folder: Path, first: int | None):
        """Takes the folder to write to."""
        self._folder, self._first, self._writes = folder, first, jax.process_index() == 0
        self._traced: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._write()

    def pauses_after(self, step: int) -> bool:
        """Whether nothing else may run when this step has ended."""
        return self._first is not None and step in (self._first - 1, self._first + STEPS - 1)

    def before(self, step: int) -> None:
        """Begins the trace if it is due."""
        if step == self._first and self._writes:
            self._traced = tempfile.mkdtemp(prefix="headshare-profile-")
            jax.profiler.start_trace(self._traced)

    def after(self, step: int) -> None:
        """Ends and writes it if it is due."""
        if self._first is not None and step == self._first + STEPS - 1:
            self._write()

    def _write(self) -> None:
        if self._traced is None:
            return
        jax.profiler.stop_trace()
        traced, self._traced = Path(self._traced), None
        for file in traced.rglob("*"):
            if file.is_file():
                target = self._folder / file.relative_to(traced).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        shutil.rmtree(traced)
