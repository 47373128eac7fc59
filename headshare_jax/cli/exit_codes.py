"""The exit codes of the command, as docs/guide.md and `headshare --help` list them."""

from enum import IntEnum

from headshare_jax import errors


class ExitCode(IntEnum):
    """How a command ended."""

    DONE = 0
    BUG = 1
    REFUSED = 2
    TRY_AGAIN = errors.TRY_AGAIN
    INTERRUPTED = 130
    TERMINATED = 143


MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.BUG: "a bug of headshare itself; please report it",
    ExitCode.REFUSED: "bad input, or what the machine cannot do; one sentence says what",
    ExitCode.TRY_AGAIN: "not now: the same command can work later (a hub that is not reached, a lock that is held, a "
    "process of a run that is gone)",
    ExitCode.INTERRUPTED: "stopped by Ctrl-C",
    ExitCode.TERMINATED: "stopped by SIGTERM",
}
