"""The command `headshare`."""

import dataclasses
import difflib
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
from contextlib import redirect_stderr
from importlib import metadata
from itertools import takewhile
from types import FrameType
from typing import Any

import jax
import tyro

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
_DESCRIPTION = "Make LLaMA-family language models smaller by letting attention heads share weights."
# Between the parts of what tyro says.
_RULER = re.compile("[─╰╯-]{9,}")
_BAD_INPUT, _INTERNAL_ERROR, _TERMINATED = 2, 1, 128 + signal.SIGTERM


def main(args: list[str] | None = None) -> None:
    """Runs one command and exits: 0 when it is done, 2 after bad input, 1 after an error of the program itself."""
    sys.unraisablehook = _stop_again
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    _quieten_libraries()
    signal.signal(signal.SIGTERM, _stop)
    args = sys.argv[1:] if args is None else args
    try:
        if args == ["--version"]:
            print(f"headshare-jax {metadata.version('headshare-jax')}")
        else:
            _parse(args).execute()
    except HeadshareError as error:
        flags = ", ".join(f"--{option.replace('_', '-')}" for option in error.options)
        return _fail(f"{error} ({flags})" if flags else str(error), _BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted; no output was left half-written.", 130)
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


def _parse(args: list[str]) -> Command:
    """The command that the arguments spell; HeadshareError, in one sentence, where they spell none."""
    name = next(iter(args), "")
    if name not in (*COMMANDS, "-h", "--help"):
        wrong = f"{name} is no command" if name else "No command was given"
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise HeadshareError(f"{wrong}; {hint} (headshare --help).")
    prog = f"headshare {name}" if name in COMMANDS else "headshare"
    if name in COMMANDS:
        _check_options(prog, COMMANDS[name], args[1:])
    refusal = io.StringIO()
    try:
        with redirect_stderr(refusal):
            command: Command = tyro.extras.subcommand_cli_from_dict(
                {**COMMANDS},
                prog="headshare",
                description=_DESCRIPTION,
                args=args,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as error:
        if error.code != _BAD_INPUT:
            raise
        raise HeadshareError(f"{_sentence(refusal.getvalue())}; see {prog} --help.") from error
    return command


def _check_options(prog: str, command: type[Command], args: list[str]) -> None:
    """Raises HeadshareError, with the nearest right one, for an option that the command does not have."""
    known = ["--help", *(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(command))]
    for arg in args:
        option = arg.partition("=")[0]
        if option.startswith("--") and option.replace("_", "-") not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]}? See" if near else "see"
            raise HeadshareError(f"{prog} has no option {option}; {hint} {prog} --help.")


def _sentence(box: str) -> str:
    """What tyro says in the first part of the box that it draws, without the help on each option."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)
    # A terminal without box characters gets no frame, and a ruler under the title.
    rows = [row.lstrip("│").rstrip(" │") for row in plain.splitlines()[1:]]
    if rows and _RULER.fullmatch(rows[0].strip()):
        rows = rows[1:]
    said = takewhile(lambda row: not _RULER.fullmatch(row.strip()), rows)
    lines = [row.strip() for row in said if row.strip() and not row.startswith(" " * 9)]
    if lines and lines[0].startswith("Missing"):
        return f"{lines[0]} {', '.join(lines[1:])}"
    text = " ".join(lines).rstrip(".")
    wrong = re.match(r"Error parsing ([^:]+):.*instantiated from \[([^\]]*)\]", text)
    wrong = wrong or re.match(r"Error parsing ([^:]+):.*('[^']*')", text)
    return f"{wrong[1]} does not take {wrong[2]}" if wrong else text or "The arguments cannot be understood"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the host's or a device's memory was too small."""
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED")
    )


def _fail(message: str, code: int) -> int:
    print(f"headshare: {' '.join(message.split())}", file=sys.stderr)
    return code


def _stop(number: int, frame: FrameType | None) -> Any:
    raise SystemExit(_TERMINATED)


def _stop_again(unraisable: Any) -> None:
    """Asks once more for a stop that met a callback, as of the garbage collector, in which Python drops exceptions."""
    lost = unraisable.exc_value
    if isinstance(lost, KeyboardInterrupt):
        number = signal.SIGINT
    elif isinstance(lost, SystemExit) and lost.code == _TERMINATED:
        number = signal.SIGTERM
    else:
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.1, os.kill, (os.getpid(), number))
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
