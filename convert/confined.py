"""Tokenizers and chat templates are programs of strangers: they are tried in a process with limits of memory and time.

Public: `ask`, `MEMORY`, `SECONDS`.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

from headshare_jax.errors import HeadshareError

# Of the process, and of a request, whose answer is waited for three times as long on a machine that is busy.
MEMORY, SECONDS = 4 * 2**30, 15
_ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0",
}  # fmt: skip
_asking = threading.Lock()


def ask(what: str, task: str, **request: Any) -> Any:
    """The answer of a function of `confined_process`.

    Args:
      what: what it works on, as the error names it.
      task, request: name and arguments of the function, plain data.

    Raises:
      HeadshareError: it raised an error, or took more than `MEMORY` or `SECONDS`.
    """
    with _asking:
        process = _process()
        timer = threading.Timer(3 * SECONDS, process.kill)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps({"task": task, "request": request}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:
            # Stopped: what it still answers must not be taken for the answer to another request.
            _end(process)
            raise
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            _end(process)
            line = '{"limit": true}'
    answer = json.loads(line)
    if "limit" in answer:
        raise HeadshareError(
            f"{what} cannot be used: it takes more than {SECONDS} s or {MEMORY // 2**30} GiB of memory, or crashes."
        )
    if "error" in answer:
        raise HeadshareError(f"{what} cannot be used: {' '.join(answer['error'].split())[:300].removesuffix('.')}.")
    return answer["value"]


@cache
def _process() -> subprocess.Popen[str]:
    """The process, which waits for requests until this one ends."""
    program = Path(__file__).with_name("confined_process.py")
    command = [sys.executable, "-P", str(program), str(MEMORY), str(SECONDS)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | _ONE_THREAD,
        # The folder that this process is in may go away.
        cwd=os.path.abspath(os.sep),
        # Ctrl-C is for this process alone.
        start_new_session=True,
    )
    atexit.register(_end, process)
    return process


def _end(process: subprocess.Popen[str]) -> None:
    atexit.unregister(_end)
    _process.cache_clear()
    process.kill()
    process.communicate()
