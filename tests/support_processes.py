"""Several processes of one run, on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import compiled

ENDS_WITHIN = 600


def started(
    args: Sequence[object],
    count: int = 2,
    *,
    devices: int = 1,
    of: dict[int, Sequence[object]] | None = None,
    folders: dict[int, Path] | None = None,
    **extra: str,
) -> list[subprocess.Popen[str]]:
    """Starts `headshare postshare` in some processes that find each other.

    Args:
      args: of all of them.
      count: how many there are.
      devices: that each has.
      of: further arguments of one process.
      folders: where a process runs, if not here.
      extra: variables of their environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": compiled.flags(devices), **extra}
    command = [sys.executable, "-m", "headshare_jax", "postshare", *map(str, args)]
    join = ["--distributed", "--coordinator", address, "--processes", str(count), "--process"]
    return [
        subprocess.Popen(
            [*command, *join, str(number), *map(str, (of or {}).get(number, ()))],
            env=environment,
            cwd=(folders or {}).get(number),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes, and what they said, once all have ended; none is left behind."""
    try:
        said = [process.communicate(timeout=ENDS_WITHIN)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def after_step(run: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    """Returns when a run has done so many steps."""
    metrics, end = run / "metrics.jsonl", time.monotonic() + ENDS_WITHIN
    while not metrics.is_file() or metrics.read_text().count("\n") < step:
        assert all(process.poll() is None for process in processes), ended(processes)
        assert time.monotonic() < end
        time.sleep(0.05)


def signalled(
    processes: list[subprocess.Popen[str]], number: int, what: signal.Signals
) -> list[tuple[int, str, float]]:
    """Sends one process a signal; exit codes of the others, what they said, and the seconds until they ended."""
    began = time.monotonic()
    processes[number].send_signal(what)
    others = [process for place, process in enumerate(processes) if place != number]
    try:
        found = []
        for process in others:
            said = process.communicate(timeout=120)[0]
            found.append((process.returncode, said, time.monotonic() - began))
    finally:
        for process in processes:
            process.kill()
        processes[number].communicate()
    return found
