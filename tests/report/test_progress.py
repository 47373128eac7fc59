"""Progress on standard error."""

import pytest

from headshare_jax.report import progress as bars


def test_a_log_gets_a_line_of_progress_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seconds, said in ((60.0, ""), (0.0, "matching: 1 of 90\nmatching: 2 of 90\n")):
        monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", seconds)
        with bars.progress("matching") as step:
            step(1, 90)
            step(2, 90)
        assert capsys.readouterr().err == said
        with bars.progress_with_text() as show:
            show(1, 90, "matching")
            show(2, 90, "")
            show(2, 90, "matching")
        assert capsys.readouterr().err == said
