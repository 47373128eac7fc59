"""The command `headshare`."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import tyro

from headshare_jax.cli.command import Command
from headshare_jax.cli.convert import Convert
from headshare_jax.cli.demo import Demo
from headshare_jax.cli.evaluate import Evaluate
from headshare_jax.cli.generate import Generate
from headshare_jax.cli.inspect import Inspect
from headshare_jax.cli.match import Match
from headshare_jax.cli.postshare import Postshare
from headshare_jax.cli.share import Share
from headshare_jax.errors import HeadshareError

COMMANDS: dict[str, Callable[..., Command]] = {
    "demo": Demo,
    "convert": Convert,
    "match": Match,
    "share": Share,
    "postshare": Postshare,
    "eval": Evaluate,
    "generate": Generate,
    "inspect": Inspect,
}
_DESCRIPTION = "Make LLaMA-family language models smaller by letting attention heads share weights."
_BAD_INPUT, _INTERNAL_ERROR = 2, 1


def main(args: list[str] | None = None) -> None:
    """Runs one command and exits: 0 when it is done, 2 after bad input, 1 after an error of the program itself."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    _quieten_libraries()
    signal.signal(signal.SIGTERM, _stop)
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="headshare", description=_DESCRIPTION, args=args, config=(tyro.conf.FlagCreatePairsOff,)
    )
    try:
        command.execute()
    except HeadshareError as error:
        return _fail(str(error), _BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted; no output was left half-written.", 130)
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not try to write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("HEADSHARE_TRACEBACK"):
            traceback.print_exc()
        return _fail(
            f"an error of the program itself, {type(error).__name__}: {str(error) or 'no message'} "
            "(set HEADSHARE_TRACEBACK=1 to see where).",
            _INTERNAL_ERROR,
        )
    return 0


def _fail(message: str, code: int) -> int:
    print(f"headshare: {' '.join(message.split())}", file=sys.stderr)
    return code


def _stop(number: int, frame: FrameType | None) -> Any:
    raise SystemExit(128 + number)


def _quieten_libraries() -> None:
    """Keeps other libraries' notices off the terminal; their errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.basicConfig(format="headshare: %(message)s", level=logging.WARNING)
    for name in ("absl", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.ERROR)
