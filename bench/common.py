"""What every benchmark says: the machine it ran on (Linux), its table, its JSON."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, load at the moment, and versions."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_rss() -> int:
    """Bytes of this process at its largest; unlike getrusage's, never those of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def child_result(*command: str, **environment: str) -> dict[str, Any]:
    """What a Python script prints as JSON on its last line, run in a process of its own.

    Args:
      command: the script and its arguments.
      environment: variables added to this process's own.

    Raises:
      subprocess.CalledProcessError: it failed.
    """
    run = subprocess.run(
        [sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def report(
    name: str,
    result: dict[str, Any],
    tables: Iterable[Table],
    notes: Iterable[str],
    path: Path | None,
) -> None:
    """Prints tables and notes, and writes the result to `path`, by default `bench/results/NAME.json`."""
    console = Console()
    for table in tables:
        console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), highlight=False)
    for note in notes:
        console.print(note, highlight=False)
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {path}", highlight=False)
