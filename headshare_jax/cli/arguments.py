"""The command that a command line spells, or one sentence on what is wrong with it."""

import difflib
import re
from functools import partial
from typing import Any

import tyro
from tyro import _errors as tyro_errors

from headshare_jax.cli.command import Command
from headshare_jax.errors import HeadshareError

_ABOUT = "Make LLaMA-family language models smaller by letting attention heads share weights."


def parse(commands: dict[str, type[Command]], args: list[str]) -> Command:
    """The command that the arguments spell.

    Raises:
      HeadshareError: they spell none; the sentence names what is wrong, and what is nearest to it.
      SystemExit: help was asked for, and has been printed.
    """
    name = next(iter(args), "")
    if name in commands:
        with tyro_errors.on_parse_error(partial(_refuse, commands[name])):
            config = (tyro.conf.FlagCreatePairsOff,)
            return tyro.cli(commands[name], prog=f"headshare {name}", args=args[1:], config=config)
    if name in ("-h", "--help"):
        return tyro.extras.subcommand_cli_from_dict({**commands}, prog="headshare", description=_ABOUT, args=[name])
    wrong = f"{name} is no command" if name else "No command was given"
    near = difflib.get_close_matches(name, commands, 1)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}"
    raise HeadshareError(f"{wrong}; {hint} (headshare --help).")


def _refuse(command: type[Command], event: tyro_errors.ParseErrorEvent) -> None:
    """Raises HeadshareError in place of the box that tyro would draw; returns from what is left for tyro to say."""
    match event:
        case (
            tyro_errors.UnrecognizedArgs(tokens=[word, *_]) | tyro_errors.MissingArgs(unrecognized_tokens=[word, *_])
        ) if word.startswith("-"):
            near = difflib.get_close_matches(word.partition("=")[0], ["--help", *command.flags().values()], 1)
            said = f"There is no option {word}" + (f"; did you mean {near[0]}?" if near else "")
        case tyro_errors.UnrecognizedArgs(tokens=[word, *_]):
            said = f"{word} is one argument too many"
        case tyro_errors.MissingArgs(missing_arguments=missing):
            said = f"Give {' and '.join(_name(each.arg) for each in missing)}"
        case tyro_errors.BadValue(argument=argument):
            said = f"{_name(argument)} needs a value"
        case tyro_errors.InstantiationFailure(argument=argument, message=message) if argument is not None:
            values = re.search("'.*'", message.partition("\n")[0])
            said = f"{_name(argument)} does not take {values[0] if values else 'this value'}"
        case _:
            return
    raise HeadshareError(f"{said} ({event.prog} --help).")


def _name(argument: Any) -> str:
    return str(argument.lowered.metavar) if argument.is_positional() else argument.display_name()
