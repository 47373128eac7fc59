"""How commands end: the table of exit codes, and what each comes of."""

from pathlib import Path
from typing import Any

import jax
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from headshare_jax import cli
from headshare_jax.cli.exit_codes import ExitCode


def test_error_of_the_program_itself_exits_with_1(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: str) -> Any:
        raise AttributeError("no such thing")

    monkeypatch.setattr("headshare_jax.convert.locate", broken)
    assert cli.run(["inspect", str(model)]) == 1
    said = capsys.readouterr().err
    assert "HEADSHARE_TRACEBACK" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "error", [MemoryError("7 TB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 TB.")]
)
def test_too_little_memory_is_no_error_of_the_program(
    refused: Any, model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def greedy(path: str) -> Any:
        raise error

    monkeypatch.setattr("headshare_jax.convert.locate", greedy)
    said = refused("inspect", model)
    assert "not enough memory" in said
    assert "7 TB" in said


def test_the_guide_and_the_help_name_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    for code in ExitCode:
        assert f"\n| {code:d} | " in guide
        assert f"\n  {code:d}  " in shown


def test_a_hub_that_is_not_reached_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetched(error: Exception) -> Any:
        def fetch(*args: Any, **kwargs: Any) -> Any:
            raise LocalEntryNotFoundError("no snapshot here") from error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        code = cli.run(["inspect", "owner/model"])
        assert "fetching it from the Hugging Face hub failed" in capsys.readouterr().err
        return code

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert fetched(ConnectionRefusedError(111, "Connection refused")) == ExitCode.TRY_AGAIN
    assert fetched(TimeoutError("no answer")) == ExitCode.TRY_AGAIN
    assert fetched(LookupError("there is no such model")) == ExitCode.REFUSED
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetched(OfflineModeIsEnabled("offline")) == ExitCode.REFUSED


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "secret.json"), "secret.json cannot be used: Permission denied."),
        (
            OSError(28, "No space left", "big.bin"),
            "big.bin cannot be used: there is no room left on the disk.",
        ),
        (OSError("a library's own words"), "a library's own words."),
    ],
)
def test_what_the_machine_refuses_is_no_error_of_the_program(
    refused: Any, model: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, words: str
) -> None:
    def denied(path: str) -> Any:
        raise error

    monkeypatch.setattr("headshare_jax.convert.locate", denied)
    assert refused("inspect", model) == f"headshare: {words}"
