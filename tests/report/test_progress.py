"""Progress on standard error."""

import pytest

from headshare_jax.report import progress as bars


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(bars, "time", made)
    return made


def test_a_log_gets_a_line_of_progress_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with bars.progress_with_text() as show:
        for seconds, text in ((19, "matching"), (2, "matching"), (19, "matching"), (30, "")):
            clock.now += seconds
            show(9, 90, text)
    assert capsys.readouterr().err == "10 %: matching\n"


def test_time_is_told_once_early_and_by_the_costs_of_all_phases(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with bars.course({"matching": 10.0, "refitting": 30.0}) as course:
        with course.phase("matching") as step:
            for done in range(1, 11):
                # The first step compiles.
                clock.now += 100 if done == 1 else 3
                step(done, 10)
        told = capsys.readouterr().err
        assert "about 117 s in all" not in told
        assert told.count("in all") == 1
        assert "about 2 min in all\n" in told
        with course.phase("refitting") as step:
            clock.now += 45
            step(15, 30)
        assert capsys.readouterr().err == "62 %: refitting 15 of 30, about 45 s left\n"


def test_a_phase_that_was_done_before_says_nothing_of_the_others(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with bars.course({"matching": 100.0, "refitting": 10.0}) as course:
        with course.phase("matching") as step:
            step(3, 3)
        with course.phase("refitting") as step:
            for done in range(1, 6):
                clock.now += 5
                step(done, 10)
    assert "about 45 s in all" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "said"), [(42.4, "42 s"), (150.0, "2 min"), (9000.0, "2.5 h")])
def test_times_are_spoken(seconds: float, said: str) -> None:
    assert bars.spoken(seconds) == said
