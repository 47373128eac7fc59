"""Killed and stopped processes: what they leave is known as theirs, and the next one puts it right."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from support import tiny_model
from support_killed import begins, commands, holds, replaces, started, stop

from headshare_jax import HeadshareError, open_checkpoint
from headshare_jax.convert import locks, save
from headshare_jax.convert.atomic import check_output, new_directory, new_file, own_file
from headshare_jax.convert.journal_folder import JournalFolder
from headshare_jax.convert.partial import temporary_folder
from headshare_jax.errors import TryAgain
from headshare_jax.signals import deferred, handled
from headshare_jax.train import run_folder

OLD, NEW = ({"headshare.json": f'{{"format": "headshare-native", "": "{age}"}}'} for age in ("old", "new"))


def content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def put(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.fixture
def tidy() -> Iterator[list[BaseProcess]]:
    """Processes that do not outlive the test."""
    processes: list[BaseProcess] = []
    yield processes
    for process in processes:
        stop(process)


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tidy: list[BaseProcess]
) -> None:
    killed, lives = (started(begins, tmp_path / "out.json") for _ in range(2))
    tidy += [killed, lives]
    before = set(tmp_path.iterdir())
    stop(killed)
    with new_file(tmp_path / "other.json") as file:
        file.write_text("{}")
    left = before - set(tmp_path.iterdir())
    assert sorted(record.message for record in caplog.records) == [
        f"{path} is removed, which a killed process had left." for path in sorted(left)
    ]
    assert [f"-{killed.pid}-" in path.name for path in left] == [True, True]
    assert [f"-{lives.pid}-" in path.name for path in before - left] == [True, True]


def test_what_a_zombie_left_goes(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""], stdout=subprocess.PIPE)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    left = tmp_path / f".out.{locks.mark().replace(str(os.getpid()), str(process.pid))}.partial"
    left.mkdir()
    check_output(tmp_path / "out", folder=True, overwrite=False)
    assert not left.exists()
    process.communicate()


def test_another_machines_unfinished_output_is_named_and_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = tmp_path / ".out.0123abcd-99999999-abcdef.partial"
    theirs.mkdir()
    with new_directory(tmp_path / "out"):
        pass
    assert f"{theirs} is of another process that writes this output; delete it if that ended." in caplog.text
    assert theirs.is_dir()


@pytest.mark.parametrize("renamings", [1, 2, 3])
def test_a_kill_between_renamings_loses_nothing(
    tmp_path: Path, renamings: int, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    put(out, OLD)
    process = started(replaces, out, *NEW.values(), renamings)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert out.exists() == (renamings > 1)
    with pytest.raises(HeadshareError, match="exists already"):
        check_output(out, folder=True, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content(out) == (OLD if renamings == 1 else NEW)
    assert (f"{out} is back: a process was killed as it replaced it." in caplog.text) == (renamings == 1)


def test_opening_an_output_that_was_being_replaced_puts_it_back(tmp_path: Path) -> None:
    save(tiny_model(), tmp_path / "out")
    gone = f".out.{locks.mark().replace(str(os.getpid()), str(4_000_000))}.old"
    (tmp_path / "out").rename(tmp_path / gone)
    assert open_checkpoint(tmp_path / "out").config.num_layers == 3


def test_temporary_folders_of_killed_processes_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tidy: list[BaseProcess]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tidy.append(started(begins, tmp_path / "headshare"))
    stop(tidy[0])
    with temporary_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


# Stops.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_tidying_up_waits_for_it(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    removed = []

    def rmtree(path: Path, **settings: object) -> None:
        signal.raise_signal(number)
        signal.raise_signal(number)
        (path / "part").unlink()
        path.rmdir()
        removed.append(path)

    monkeypatch.setattr("shutil.rmtree", rmtree)
    # Tests that run in a shell's background ignore Ctrl-C.
    before = signal.signal(number, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(number, before))
    with handled(interrupt):
        with pytest.raises(KeyboardInterrupt) as stopped, new_directory(tmp_path / "out") as folder:  # noqa: PT012
            (folder / "part").write_text("half")
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert stopped.value.args == (number,)
    assert removed == [folder]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_stopped_at_any_moment_leaves_one_whole_output(
    tmp_path: Path, number: signal.Signals, tidy: list[BaseProcess]
) -> None:
    moments = random.Random(number)
    model, place = tmp_path / "model", tmp_path / "place"
    save(tiny_model(), model, to="hf")
    place.mkdir()
    save(tiny_model(seed=1), place / "out", to="hf")
    old = weights(place / "out")
    for _ in range(3):
        process = started(commands, "convert", model, place / "out", "--to", "hf", "--overwrite")
        tidy.append(process)
        process.join(moments.uniform(0, 0.5))
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, number)
        process.join()
        if number == signal.SIGKILL:
            check_output(place / "out", folder=True, overwrite=True)
        assert [path.name for path in place.iterdir()] == ["out"]
        assert weights(place / "out") in (old, weights(model))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_pythons_own_ctrl_c_waits_too() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    told = []
    try:
        with pytest.raises(KeyboardInterrupt), deferred():  # noqa: PT012 (what is raised comes last)
            signal.raise_signal(signal.SIGINT)
            told.append("done")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == ["done"]


def test_what_threads_write_after_an_error_goes_with_the_process(tmp_path: Path) -> None:
    script = """
        import sys, threading, time
        from pathlib import Path
        from headshare_jax.convert.atomic import new_directory

        def write_on(folder):
            time.sleep(0.5)
            folder.mkdir()
            (folder / "part").write_text("half")

        with new_directory(Path(sys.argv[1])) as folder:
            threading.Thread(target=write_on, args=[folder]).start()
            sys.exit(3)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == 3
    assert not list(tmp_path.iterdir())


# Locks.


def test_one_process_has_a_folder(tmp_path: Path, tidy: list[BaseProcess], caplog: pytest.LogCaptureFixture) -> None:
    tidy.append(started(holds, tmp_path))
    for _ in range(2):
        said = f"The process {tidy[0].pid} on .* has the folder {tmp_path} since 20"
        with pytest.raises(TryAgain, match=said), locks.held(tmp_path):
            pass
    stop(tidy[0])
    assert list(tmp_path.iterdir()) == [tmp_path / locks.NAME]
    with locks.held(tmp_path):
        assert f"The folder {tmp_path} was left by process {tidy[0].pid}, which was killed." in caplog.text
    assert not list(tmp_path.iterdir())


def test_journals_and_runs_have_one_process(tmp_path: Path, tidy: list[BaseProcess]) -> None:
    tidy.append(started(holds, tmp_path))
    for held in (JournalFolder(tmp_path).held, lambda: run_folder.locked(tmp_path)):
        with pytest.raises(TryAgain, match=f"process {tidy[0].pid} on .* has the folder {tmp_path}"), held():
            pass


def test_a_lock_of_another_machine_is_named_with_what_to_do(tmp_path: Path) -> None:
    lock = tmp_path / locks.NAME
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "2026-01-01 00:00:00 +0000"}))
    said = f"process 1 on elsewhere .* If there is no such process there any more, delete {lock}"
    with pytest.raises(TryAgain, match=said), locks.held(tmp_path):
        pass
    lock.write_text("")  # its process was killed as it took it
    with locks.held(tmp_path):
        pass


def test_without_locks_of_the_system_the_process_number_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tidy: list[BaseProcess]
) -> None:
    tidy.append(started(holds, tmp_path))
    monkeypatch.setattr(locks, "HAS_FILE_LOCKS", False)
    with pytest.raises(TryAgain, match="wait until it has ended, or stop it"), locks.held(tmp_path):
        pass
    stop(tidy[0])
    with locks.held(tmp_path):
        pass


def test_files_of_our_own_folder_are_replaced_whatever_they_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "metrics.jsonl").write_text("{}")
    with own_file(tmp_path / "metrics.jsonl") as file:
        file.write_text("new")
    assert content(tmp_path) == {"metrics.jsonl": "new"}
    assert caplog.text == ""
