"""The command `headshare`: each of its commands is a file, which parses, calls and prints. Public: `main`, `run`."""

import logging
import os
import signal
import sys
import threading
import traceback
from importlib import metadata
from types import FrameType
from typing import Any

import jax

from headshare_jax.cli.arguments import parse
from headshare_jax.cli.command import Command
from headshare_jax.cli.convert import Convert
from headshare_jax.cli.demo import Demo
from headshare_jax.cli.evaluate import Evaluate
from headshare_jax.cli.generate import Generate
from headshare_jax.cli.inspect import Inspect
from headshare_jax.cli.match import Match
from headshare_jax.cli.plan import Plan
from headshare_jax.cli.postshare import Postshare
from headshare_jax.cli.share import Share
from headshare_jax.cli.sweep import Sweep
from headshare_jax.errors import HeadshareError
from headshare_jax.signals import handled

COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "convert": Convert,
    "match": Match,
    "share": Share,
    "sweep": Sweep,
    "postshare": Postshare,
    "eval": Evaluate,
    "generate": Generate,
    "inspect": Inspect,
    "plan": Plan,
}
_BAD_INPUT, _INTERNAL_ERROR, _SIGNALLED = 2, 1, 128


def main(args: list[str] | None = None) -> None:
    """Runs one command and exits: 0 when it is done, 2 after bad input, 1 after an error of the program itself."""
    sys.unraisablehook = _stop_again
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    _quieten_libraries()
    args = sys.argv[1:] if args is None else args
    command = None
    try:
        with handled(_stop):
            if args == ["--version"]:
                print(f"headshare-jax {metadata.version('headshare-jax')}")
            else:
                command = parse(COMMANDS, args)
                command.execute()
    except HeadshareError as error:
        # A library names its arguments, which may be options of this command.
        options = command.flags() if command else {}
        flags = ", ".join(options[name] for name in error.options if name in options)
        return _fail(f"{str(error).removesuffix('.')} ({flags})." if flags else str(error), _BAD_INPUT)
    except KeyboardInterrupt as stop:
        return _fail("stopped; no output was left half-written.", _SIGNALLED + _number(stop))
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not try to write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if _is_out_of_memory(error):
            return _fail(f"there is not enough memory ({error}); use a smaller batch, length or model.", _BAD_INPUT)
        if os.environ.get("HEADSHARE_TRACEBACK"):
            traceback.print_exc()
        return _fail(
            f"an error of the program itself, {type(error).__name__}: {str(error) or 'no message'} "
            "(set HEADSHARE_TRACEBACK=1 to see where).",
            _INTERNAL_ERROR,
        )
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the host's or a device's memory was too small."""
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED")
    )


def _fail(message: str, code: int) -> int:
    print(f"headshare: {' '.join(message.split())}", file=sys.stderr)
    return code


def _stop(number: int, frame: FrameType | None) -> Any:
    raise KeyboardInterrupt(number)


def _number(stop: BaseException) -> int:
    """The signal that asked for a stop."""
    return stop.args[0] if stop.args else signal.SIGINT


def _stop_again(unraisable: Any) -> None:
    """Sends a stop once more that met a destructor or callback, as of the garbage collector: Python drops it there."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.1, os.kill, (os.getpid(), _number(unraisable.exc_value)))
    again.daemon = True
    again.start()


def _quieten_libraries() -> None:
    """Keeps other libraries' notices off the terminal; their errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.basicConfig(format="headshare: %(message)s", level=logging.WARNING)
    for name in ("absl", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.ERROR)
