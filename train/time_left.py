"""How long the rest of a run will take, by what its steps and the pauses between them took."""

from collections.abc import Sequence
from statistics import median

# Steps that are looked at, the last ones.
_STEPS = 20


class TimeLeft:
    """The time left in each stage; the first step of a stage is left out, for it compiles."""

    def __init__(self, steps: Sequence[int]):
        """Takes the steps of every stage."""
        self.steps = steps
        self._seconds: list[float] = []
        self._before = 0.0
        self._pauses: list[float] = []

    def enter(self) -> None:
        """A stage begins, or goes on."""
        self._before, self._seconds = self.seconds_in_steps, []

    @property
    def seconds_in_steps(self) -> float:
        """Of all steps that were done; the first of a stage, which compiles, counts as the others do."""
        first, rest = self._seconds[:1], self._seconds[1:]
        return self._before + sum(rest) + sum(min(seconds, median(rest or first)) for seconds in first)

    def step(self, seconds: float) -> None:
        """A step was done."""
        self._seconds.append(seconds)

    def pause(self, seconds: float) -> None:
        """An evaluation or a checkpoint was done."""
        self._pauses.append(seconds)

    def left(self, number: int, done: int, pauses: Sequence[int]) -> list[float] | None:
        """Seconds that are left of this stage and of each after it; None before the second step.

        Args:
          number: of the stage, from 0.
          done: its steps that are done.
          pauses: evaluations that are left in this stage and in each after it.
        """
        timed = self._seconds[1:][-_STEPS:]
        if not timed:
            return None
        step, pause = median(timed), median(self._pauses) if self._pauses else 0.0
        compiling = max(0.0, self._seconds[0] - step)
        steps = [self.steps[number] - done, *self.steps[number + 1 :]]
        return [
            count * step + waits * pause + (compiling if place else 0.0)
            for place, (count, waits) in enumerate(zip(steps, pauses, strict=True))
        ]
