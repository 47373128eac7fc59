"""A command that is told to stop does, by Ctrl-C and by SIGTERM, and leaves nothing half-written."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STOPS = (signal.SIGINT, signal.SIGTERM)
# Where tests run in the background, a process begins with SIGINT ignored.
HEARS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
LONG_ANSWER = """
import sys
from headshare_jax.cli import main

main(["generate", sys.argv[1], "--prompt", "One", "--max-new-tokens", "100000"])
"""
# The first of its signals arrives in a destructor, where Python drops what a handler raises.
STOPPED_AS_IT_WRITES = """
import os, sys, time
import headshare_jax.convert.native_writer as native_writer
from headshare_jax.cli import main

class Swallows:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(1)

def write(source, folder, *args, **kwargs):
    (folder / "weights").write_text("half of them")
    Swallows()
    time.sleep(60)

native_writer.write = write
main(["convert", sys.argv[1], "out" + sys.argv[2], "--to", "native"])
"""


@contextmanager
def started(code: str, folder: Path, *args: object) -> Iterator[list[subprocess.Popen[str]]]:
    """A process for each way to stop, which is its last argument; none outlives a test that fails."""
    commands = [[sys.executable, "-c", HEARS_CTRL_C + code, *map(str, args), str(int(number))] for number in STOPS]
    processes = [subprocess.Popen(each, stderr=subprocess.PIPE, text=True, cwd=folder) for each in commands]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_long_answer_can_be_stopped(model: Path, tmp_path: Path) -> None:
    with started(LONG_ANSWER, tmp_path, model) as processes:
        for process in processes:
            assert process.stderr is not None
            while "the model was made for" not in process.stderr.readline():
                assert process.poll() is None
        # By then they are in the compiled loop, for minutes.
        time.sleep(5)
        for process, number in zip(processes, STOPS, strict=True):
            process.send_signal(number)
            assert process.wait(10) == -number


def test_a_stop_is_not_lost_and_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    with started(STOPPED_AS_IT_WRITES, tmp_path, model) as processes:
        for process, number in zip(processes, STOPS, strict=True):
            assert process.wait(120) == 128 + number
            assert process.stderr is not None
            assert process.stderr.read() == "headshare: stopped; no output was left half-written.\n"
    assert list(tmp_path.iterdir()) == []
