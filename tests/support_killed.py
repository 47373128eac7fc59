"""Processes that are killed or wait: each runs a function of this file, and begins fast, as a copy of a ready one."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from headshare_jax import cli
from headshare_jax.convert.locks import held
from headshare_jax.convert.partial import take_place, unfinished

# Of a native checkpoint, bytes.
SMALL_FILES = 8_192
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["headshare_jax.cli"])


def started(function: Callable[..., None], *args: Any) -> BaseProcess:
    """A process that runs a function and has come to where that calls the one it is given."""
    begun = _processes.Event()
    process = _processes.Process(target=function, args=(begun.set, *args), daemon=True)
    process.start()
    assert begun.wait(120)
    return process


def stop(process: BaseProcess) -> None:
    """Kills it, and returns when it has ended."""
    process.kill()
    process.join()


def begins(ready: Callable[[], None], out: Path) -> None:
    """Is in the midst of a file and a folder."""
    with unfinished(out, folder=True) as folder, unfinished(out, folder=False):
        (folder / "part").write_text("half")
        ready()
        time.sleep(600)


def commands(ready: Callable[[], None], *args: object) -> None:
    """Runs a command, without a word."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    ready()
    cli.main([str(arg) for arg in args])


def holds(ready: Callable[[], None], folder: Path) -> None:
    """Has a folder to itself."""
    with held(folder):
        ready()
        time.sleep(600)


def replaces(ready: Callable[[], None], out: Path, text: str, renamings: int) -> None:
    """Replaces a model, and is killed when it has renamed so many folders."""
    rename, renamed = os.rename, []

    def killed(one: Path, other: Path) -> None:
        rename(one, other)
        renamed.append(other)
        if len(renamed) == renamings:
            os.kill(os.getpid(), signal.SIGKILL)

    os.rename = killed  # type: ignore[assignment]
    with unfinished(out, folder=True) as folder:
        (folder / "headshare.json").write_text(text)
        ready()
        take_place(folder, out)


def converts(ready: Callable[[], None], src: Path, dst: str, to: str, at: int | str, variables: dict[str, str]) -> None:
    """Converts a model, and is killed when it has written so many parts of it down, or called a function of `storage`.

    The variables are of the environment, by which a bucket is found.
    """
    import headshare_jax as hs
    from headshare_jax.convert import native_array, pieces, storage
    from headshare_jax.convert.written import Written
    from headshare_jax.sharing import source

    os.environ |= variables
    native_array.SHARD_BYTES = pieces.PIECE_BYTES = source.TABLE_BYTES = SMALL_FILES
    if isinstance(at, int):
        Written.add = _killing(Written.add, at)  # type: ignore[method-assign]
    else:
        setattr(storage, at, _killing(getattr(storage, at), 1))
    ready()
    hs.save(hs.open_checkpoint(src), dst, to=to, tokenizer_from=src)


def _killing(function: Callable[..., None], calls: int) -> Callable[..., None]:
    """The function, that kills this process when it has been called so often."""
    called = []

    def killed(*args: Any) -> None:
        function(*args)
        called.append(args)
        if len(called) == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    return killed
