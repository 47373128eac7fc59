"""Starts the processes of a distributed run, and ends them together."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax._src.clusters import ClusterEnv

from headshare_jax.errors import HeadshareError
from headshare_jax.processes.agreement import wait_for_all
from headshare_jax.processes.meeting import meet
from headshare_jax.processes.relay import relay
from headshare_jax.processes.watch import Remedy, Watch, silence_seconds

# JAX's own time limits, which only count where the watch does not come first.
_LATER = 300

_watch: Watch | None = None
_number = 0


@contextmanager
def joined(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, within: float
) -> Iterator[None]:
    """Joins the other processes of a run, and leaves with them at the end of the block.

    If another is gone meanwhile, this process says so and ends with code 75. If this one raises, the others are told
    and end too.

    Args:
      coordinator: address:port of the first process; found by itself on TPU pods, Slurm and GKE, as are the others.
      processes: number of processes.
      process: number of this one, from 0.
      within: seconds in which all must have come.

    Raises:
      TryAgain: some did not come.
      HeadshareError: it is not known who the others are, or they were not started as one run.
    """
    global _watch, _number
    address, count, me, devices = _places(coordinator, processes, process, within)
    _number = me
    peers = meet(address, count, me, within)
    silence = silence_seconds()
    _watch = Watch(me, peers, silence)
    host, port = address.rsplit(":", 1)
    jax.distributed.initialize(
        address if me == 0 else relay(host.strip("[]"), int(port), within),
        count,
        me,
        devices,
        coordinator_bind_address=f"[::]:{port}" if me == 0 else None,
        initialization_timeout=int(within),
        heartbeat_timeout_seconds=max(_LATER, int(4 * silence)),
        shutdown_timeout_seconds=_LATER,
    )
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is not None:
        # JAX has set a handler of its own, past Python.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    try:
        yield
    except HeadshareError as error:
        _watch.wait(2)
        _watch.leave(str(error))
        raise
    except Exception as error:
        # It may be what a collective says when another process is gone.
        _watch.wait(silence + 5 if isinstance(error, jax.errors.JaxRuntimeError) else 2)
        _watch.leave(f"{type(error).__name__}: {error}")
        raise
    except BaseException:
        if _watch is not None:
            _watch.leave("it was told to stop")
        raise
    else:
        leave()


def leave() -> None:
    """Waits for all others to come to their end too, and parts from them; does nothing where there are none."""
    global _watch
    if _watch is not None:
        wait_for_all("end")
        _watch.leave()
        _watch = None
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is the first of the processes that it has joined, or has joined none; devices are not looked for."""
    return _number == 0


def set_remedy(remedy: Remedy) -> None:
    """Sets what gives the end of the sentence that says another process is gone: what to do then."""
    if _watch is not None:
        _watch.remedy = remedy


def quit_apart(code: int) -> None:
    """Ends this process at once if it has joined others and not left with them: JAX would wait for them at its end."""
    if _watch is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _places(
    coordinator: str | None, processes: int | None, process: int | None, within: float
) -> tuple[str, int, int, Sequence[int] | None]:
    """Address of the first process, number of all, number of this one, and its devices where they are shared out."""
    named = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    mine = [int(number) for number in named.split(",")] if named else None
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    found: tuple[Any, ...] = ClusterEnv.auto_detect_unset_distributed_params(
        address, processes, process, mine, None, int(within)
    )
    address, count, me, devices = found
    if address is None or count is None or me is None:
        raise HeadshareError(
            "The other processes were not found: this is no TPU pod, Slurm or GKE job that JAX knows; name the first "
            "process, how many there are, and which this one is.",
            option=("coordinator", "processes", "process"),
        )
    if not 0 <= me < count:
        raise HeadshareError(
            f"This is process {me}, but {count} processes have numbers below {count}.", option="process"
        )
    return address, count, me, devices
