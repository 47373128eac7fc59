"""Runs commands, on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_cli_model

from headshare_jax import cli
from headshare_jax.cli.exit_codes import ExitCode


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cli_model.saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture
def headshare(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must succeed; returns what it printed, as data if it was asked for JSON."""

    def call(*args: object) -> Any:
        capsys.readouterr()
        assert cli.run([str(arg) for arg in args]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in args else printed

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs a command that must refuse its input and leave nothing behind; returns the sentence it says."""

    def call(*args: object, code: ExitCode = ExitCode.REFUSED) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert cli.run([str(arg) for arg in args]) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        *_, said = printed.err.strip().splitlines()
        assert said.startswith("headshare: ")
        assert "Traceback" not in printed.err
        assert "" not in printed.err.splitlines()
        return said

    return call
