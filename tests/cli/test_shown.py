"""What commands print: names are text whatever they hold, and a pipe gets whole lines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_cli_model
from rich.table import Table

from headshare_jax import cli
from headshare_jax.report import console, progress

LONG = "a-name-that-is-longer-than-any-line-of-a-terminal-" * 3


def test_a_name_like_markup_is_a_name(headshare: Any, model: Path, text: Path, tmp_path: Path) -> None:
    name = tmp_path / "train[" / "x].txt"
    name.parent.mkdir()
    name.write_text(text.read_text())
    refit = ("--method", "refit", "--calibrate", name, "--calibrate-tokens", 256, "--seq-len", 64)
    assert f"{tmp_path}/shared[red]: " in headshare("share", model, tmp_path / "shared[red]", "--ratio", 0.3, *refit)
    few = ("--ratios", 0.3, "--methods", "direct")
    measured = headshare("sweep", model, "-o", tmp_path / "report[y]", "--text", name, *few)
    assert f"text: {name}" in measured
    assert f"{tmp_path}/shared[red]" in headshare("inspect", tmp_path / "shared[red]")
    said = headshare("generate", model, "--prompt", "[/x] [bold]two[/bold] :smile:", "--max-new-tokens", 2)
    assert "[/x] [bold]two[/bold] :smile:" in said


def test_names_like_markup_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = Table("part", title="of train[/x].txt")
    table.add_row("[/y] :smile:")
    console.show(table)
    console.show("at [/z]")
    printed = capsys.readouterr().out
    for part in ("train[/x].txt", "[/y] :smile:"):
        assert part in printed
    progress.say("[/x]")


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str], headshare: Any, tmp_path: Path) -> None:
    table = Table("name", "value", title=f"title {LONG}", caption=f"caption {LONG}")
    table.add_row(LONG, "1")
    console.show(table)
    lines = capsys.readouterr().out.splitlines()
    for part in (f"title {LONG}", f"caption {LONG}", LONG):
        assert any(part in line for line in lines)
    assert not any(line.endswith(" ") for line in lines)
    folder = tiny_cli_model.saved_without_torch(tmp_path / LONG)
    assert f"{folder}: hf, family llama" in headshare("inspect", folder)
    assert cli.run(["share", "--help"]) == 0
    # Help is a page to read.
    assert 80 < max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_a_pipe_without_a_reader_and_a_full_device(model: Path) -> None:
    command = [sys.executable, "-m", "headshare_jax", "inspect", str(model)]
    reader, writer = os.pipe()
    os.close(reader)
    unread = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    with Path("/dev/full").open("w") as full:
        crammed = subprocess.Popen([*command, "--json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (unread.communicate()[1], unread.returncode) == ("", 0)
    said = "headshare: A file, or standard output, cannot be used: there is no room left on the disk.\n"
    assert (crammed.communicate()[1], crammed.returncode) == (said, 2)


def test_text_that_the_encoding_lacks_is_shown_escaped(model: Path) -> None:
    program = "import sys; from headshare_jax.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "inspect", str(model), "--shards", "0", "é\udcff"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr.decode("ascii").startswith("headshare: \\xe9\\udcff is one argument too many")


def test_json_takes_any_name(headshare: Any, tmp_path: Path) -> None:
    folder = tiny_cli_model.saved_without_torch(tmp_path / "plain").rename(tmp_path / "caf\udce9[x]")
    printed = headshare("inspect", folder, "--json")
    assert json.loads(json.dumps(printed))["path"] == str(folder)
