"""The command `headshare`: each of its commands is a file, which parses, calls and prints. Public: `main`, `run`."""

import io
import logging
import os
import select
import signal
import sys
import threading
import traceback
from contextlib import suppress
from importlib import metadata
from types import FrameType
from typing import Any

import jax

from headshare_jax.cli.arguments import parse
from headshare_jax.cli.chat import Chat
from headshare_jax.cli.command import Command
from headshare_jax.cli.compare import Compare
from headshare_jax.cli.compiled import keep_compiled_programs
from headshare_jax.cli.convert import Convert
from headshare_jax.cli.demo import Demo
from headshare_jax.cli.evaluate import Evaluate
from headshare_jax.cli.exit_codes import ExitCode
from headshare_jax.cli.generate import Generate
from headshare_jax.cli.inspect import Inspect
from headshare_jax.cli.match import Match
from headshare_jax.cli.plan import Plan
from headshare_jax.cli.postshare import Postshare
from headshare_jax.cli.share import Share
from headshare_jax.cli.sweep import Sweep
from headshare_jax.convert import bucket_errors
from headshare_jax.errors import HeadshareError, TryAgain, explained
from headshare_jax.processes.start import quit_apart
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
    "chat": Chat,
    "compare": Compare,
    "inspect": Inspect,
    "plan": Plan,
}
# Characters of a word of a message, such as a path.
_LONGEST = 1000
# Of a process that a signal stopped: the signal's number, and so much.
_SIGNALLED = 128


def main(args: list[str] | None = None) -> None:
    """Runs one command and exits, with one of the codes of `exit_codes`."""
    sys.unraisablehook = _stop_again
    code = run(args)
    quit_apart(code)
    sys.exit(code)


def run(args: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    _prepare_streams()
    _quieten_libraries()
    args = sys.argv[1:] if args is None else args
    command = None
    try:
        with handled(_stop):
            if args == ["--version"]:
                print(f"headshare-jax {metadata.version('headshare-jax')}")
                code = ExitCode.DONE
            else:
                command, code = parse(COMMANDS, args), ExitCode.DONE
                if command:
                    keep_compiled_programs()
                    code = command.execute()
            sys.stdout.flush()
    except HeadshareError as error:
        # A library names its arguments, which may be options of this command.
        options = command.flags() if command else {}
        flags = ", ".join(options[name] for name in error.options if name in options)
        said = f"{str(error).removesuffix('.')} ({flags})." if flags else str(error)
        return _fail(said, ExitCode.TRY_AGAIN if isinstance(error, TryAgain) else ExitCode.REFUSED)
    except KeyboardInterrupt as stop:
        for again in _stops_again:
            # It was heard after all, and must not meet what tidies up.
            again.cancel()
        return _fail("stopped; no output was left half-written.", ExitCode(_SIGNALLED + _number(stop)))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            # Whoever read our output has seen enough.
            _drop_output()
            return ExitCode.DONE
        if _is_out_of_memory(error):
            return _fail(f"there is not enough memory ({error}); use a smaller batch, length or model.")
        if refusal := bucket_errors.refusal_unnamed(error):
            return _fail(str(refusal), ExitCode.TRY_AGAIN if isinstance(refusal, TryAgain) else ExitCode.REFUSED)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            if not error.filename:
                _drop_output()
            return _fail(explained(error))
        if os.environ.get("HEADSHARE_TRACEBACK"):
            traceback.print_exc()
        return _fail(
            f"an error of the program itself, {type(error).__name__}: {str(error) or 'no message'} "
            "(set HEADSHARE_TRACEBACK=1 to see where).",
            ExitCode.BUG,
        )
    return code


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that its reader has closed."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _drop_output() -> None:
    """Lets the interpreter write nothing more when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare_streams() -> None:
    """Lets text through that an encoding has no characters for, and gives a closed stream somewhere to write to."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the host's or a device's memory was too small."""
    # XLA's CPU backend says it in its own way.
    said = ("RESOURCE_EXHAUSTED", "Out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and any(words in str(error) for words in said)
    )


def _fail(message: str, code: ExitCode = ExitCode.REFUSED) -> int:
    """Says one line on standard error, whatever characters come in names."""
    words = " ".join(word if len(word) <= _LONGEST else f"{word[:_LONGEST]}..." for word in message.split())
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in words)
    with suppress(OSError):
        print(f"headshare: {shown}", file=sys.stderr, flush=True)
    return code


def _stop(number: int, frame: FrameType | None) -> Any:
    raise KeyboardInterrupt(number)


def _number(stop: BaseException) -> int:
    """The signal that asked for a stop."""
    return stop.args[0] if stop.args else signal.SIGINT


_stops_again: list[threading.Timer] = []


def _stop_again(unraisable: Any) -> None:
    """Sends a stop once more that met a destructor or callback, as of the garbage collector: Python drops it there."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        # Of a library's own callbacks, as of an event loop that a full disk has closed; what counts is raised besides.
        if os.environ.get("HEADSHARE_TRACEBACK"):
            sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.1, os.kill, (os.getpid(), _number(unraisable.exc_value)))
    again.daemon = True
    _stops_again.append(again)
    again.start()


def _quieten_libraries() -> None:
    """Keeps other libraries' notices off the terminal; their errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.basicConfig(format="headshare: %(message)s", level=logging.WARNING)
    # Where a library was first to set logging up.
    for handler in logging.root.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter("headshare: %(message)s"))
    for name in ("absl", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # They show a traceback of what they raise besides.
    for name in ("fsspec", "gcsfs", "s3fs", "botocore", "aiobotocore", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
