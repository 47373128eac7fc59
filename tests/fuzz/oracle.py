"""What may come of any input: done, or refused in a sentence; soon, in little memory, with nothing half-written."""

import base64
import io
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headshare_jax import cli

# Bad input, try again later, and stopped by a signal; 1 is an error of the program itself.
ALLOWED = (0, 2, 75, 130, 143)
MOST_SECONDS, MOST_BYTES = 60, 4 * 2**30
# Their outputs keep what was finished before an error, to go on from there.
KEEPS_WORK = ("sweep", "postshare")


@dataclass(frozen=True)
class Input:
    """A command line, and the files that it finds in its folder.

    Attributes:
      kind: what is fuzzed.
      args: of the command.
      files: contents by path; they lie over those of the seeds.
      seeds: names of valid files and folders (see `seeds`).
    """

    kind: str
    args: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    seeds: tuple[str, ...] = ()

    def to_json(self) -> str:
        """What repeats the input: `python tests/fuzz/long.py --repeat FILE`."""
        files = {name: base64.b64encode(content).decode() for name, content in self.files.items()}
        return json.dumps({"kind": self.kind, "args": self.args, "seeds": self.seeds, "files": files})

    @classmethod
    def from_json(cls, text: str) -> "Input":
        fields = json.loads(text)
        files = {name: base64.b64decode(content) for name, content in fields["files"].items()}
        return cls(fields["kind"], tuple(fields["args"]), files, tuple(fields["seeds"]))


@dataclass(frozen=True)
class Outcome:
    """What came of an input.

    Attributes:
      code: exit code; None if an error escaped.
      seconds, memory: what it took; bytes, at most, beyond those that were resident before.
      said: standard error.
      problem: what is wrong with it, or None.
    """

    code: int | None
    seconds: float
    memory: int
    said: str
    problem: str | None


def lay_out(given: Input, seeds: Path, folder: Path) -> None:
    """Puts an input's files into a folder."""
    for name in given.seeds:
        source = seeds / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    for name, content in given.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def try_input(given: Input, seeds: Path, folder: Path) -> Outcome:
    """Runs an input in a folder inside an empty one; what it names above lies in there, too."""
    working = folder / "a" / "b"
    working.mkdir(parents=True)
    lay_out(given, seeds, working)
    before = _listing(folder)
    resident = _forget_peak()
    begin = time.monotonic()
    with _inside(working), _captured(folder.parent) as captured:
        try:
            code: int | None = cli.run(list(given.args))
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0
        except BaseException:
            traceback.print_exc()
            code = None
    seconds, memory = time.monotonic() - begin, _peak() - resident
    printed, said = captured
    problem = _problem(given, code, printed, said, _difference(before, _listing(folder)))
    if seconds > MOST_SECONDS:
        problem = f"it took {seconds:.0f} s"
    elif memory > MOST_BYTES:
        problem = f"it took {memory / 2**30:.1f} GiB"
    return Outcome(code, seconds, memory, said, problem)


def _problem(given: Input, code: int | None, printed: str, said: str, differences: list[str]) -> str | None:
    if code not in ALLOWED:
        return f"exit code {code}"
    if "Traceback" in said or "panicked" in said:
        return "a traceback"
    if any(".partial" in name or name.endswith(".old") for name in differences):
        return f"half-written: {', '.join(differences)}"
    if code == 0:
        return None if printed.strip() else "nothing was said"
    lines = said.strip().splitlines() or [""]
    if not lines[-1].startswith("headshare: ") or len(lines[-1]) < 20:
        return "no sentence"
    keeps = given.args[:1] in [(name,) for name in KEEPS_WORK] or "--work" in given.args
    return f"left behind: {', '.join(differences)}" if differences and not keeps else None


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (0, 0)
        for path in folder.rglob("*")
    }


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    outside = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(outside)


@contextmanager
def _captured(folder: Path) -> Iterator[list[str]]:
    """Standard output and error, also of what is no Python, as a list of two once the block ends."""
    found: list[str] = []
    files = [(folder / name).open("w+b") for name in ("stdout", "stderr")]
    kept = [os.dup(number) for number in (1, 2)]
    streams = sys.stdin, sys.stdout, sys.stderr
    handlers, logging.root.handlers = logging.root.handlers, []
    sys.stdin = io.StringIO("Hello\n")
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(file.fileno(), "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
        for file in files
    )
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(file.fileno(), number)
    try:
        yield found
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        logging.root.handlers = handlers
        for number, copy, file in zip((1, 2), kept, files, strict=True):
            os.dup2(copy, number)
            os.close(copy)
            file.seek(0)
            found.append(file.read().decode(errors="replace"))
            file.close()


def _forget_peak() -> int:
    """Bytes that are resident, from which `_peak` counts."""
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")
    return _peak()


def _peak() -> int:
    """The most bytes that were resident since `_forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
