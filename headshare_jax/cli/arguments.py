"""The command that a command line spells, or one sentence on what is wrong with it."""

import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import tyro
from rich.table import Table
from tyro import _errors as tyro_errors
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from headshare_jax.cli.command import Command
from headshare_jax.cli.exit_codes import MEANINGS
from headshare_jax.convert import storage
from headshare_jax.errors import HeadshareError
from headshare_jax.report.console import show

_ABOUT = "Make LLaMA-family language models smaller by letting attention heads share weights."
_WORDS = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}
_REGISTRY = ConstructorRegistry()


def parse(commands: dict[str, type[Command]], args: list[str]) -> Command | None:
    """The command that the arguments spell; None where help was asked for, which has been printed.

    Raises:
      HeadshareError: they spell none; the sentence names what is wrong, and what is nearest to it.
    """
    name = next(iter(args), "")
    if name in commands:
        return _parsed(commands[name], name, args[1:])
    if name in ("-h", "--help"):
        _overview(commands)
        return None
    wrong = f"{name} is no command" if name else "No command was given"
    near = difflib.get_close_matches(name, commands, 1)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}"
    raise HeadshareError(f"{wrong}; {hint} (headshare --help).")


def _parsed(kind: type[Command], name: str, args: list[str]) -> Command | None:
    config = (tyro.conf.FlagCreatePairsOff,)
    try:
        with tyro_errors.on_parse_error(partial(_refuse, kind)), _page_wide():
            command = tyro.cli(
                kind, prog=f"headshare {name}", args=kind.spelt_out(args), config=config, registry=_REGISTRY
            )
    except SystemExit as done:
        if done.code:
            raise
        return None
    words = {word.partition("=")[0].replace("_", "-") for word in args if word.startswith("-")}
    return command.checked(frozenset(field for field, flags in kind.spellings().items() if words & flags))


@contextmanager
def _page_wide() -> Iterator[None]:
    """Has tyro write help that goes through a pipe as wide as a page, not as wide as no terminal would be."""
    columns = os.environ.get("COLUMNS")
    if columns is None and not sys.stdout.isatty():
        os.environ["COLUMNS"] = "120"
    try:
        yield
    finally:
        if columns is None:
            os.environ.pop("COLUMNS", None)


@_REGISTRY.primitive_rule
def _scalar(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """One value; an empty path, which Python takes for the working directory, is none."""
    kind = info.type
    if kind not in _WORDS:
        return None

    def read(words: list[str]) -> Any:
        if kind is not Path:
            return kind(words[0])
        if not words[0]:
            raise ValueError("''")
        try:
            return storage.path(words[0])
        except HeadshareError:
            raise ValueError(repr(words[0])) from None

    def is_one(value: Any) -> bool:
        return isinstance(value, kind) or (kind is Path and storage.in_bucket(value))

    return PrimitiveConstructorSpec(1, _WORDS[kind], read, is_one, lambda v: [str(v)])


@_REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A value that may be left out is spelt as any other; the word None is none."""
    kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
    if NoneType not in get_args(info.type) or len(kinds) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    assert isinstance(spec, PrimitiveConstructorSpec)
    is_one, written = spec.is_instance, spec.str_from_instance
    return replace(
        spec,
        is_instance=lambda value: value is None or is_one(value),
        str_from_instance=lambda value: [] if value is None else written(value),
    )


def _overview(commands: dict[str, type[Command]]) -> None:
    """Prints what the commands do, and how they end."""
    show(f"usage: headshare COMMAND ...\n\n{_ABOUT}\n")
    table = Table.grid(padding=(0, 2))
    for name, command in commands.items():
        table.add_row(f"  {name}", (command.__doc__ or "").partition("\n")[0])
    show(table)
    show("\nheadshare COMMAND --help shows its options and an example; headshare --version the version.\n\nExit codes:")
    table = Table.grid(padding=(0, 2))
    for code, meaning in MEANINGS.items():
        table.add_row(f"  {code:d}", meaning)
    show(table)


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
            count = argument.lowered.nargs
            said = f"{_name(argument)} needs {f'{count} values' if isinstance(count, int) and count > 1 else 'a value'}"
        case tyro_errors.InstantiationFailure(argument=argument, message=message) if argument is not None:
            values = re.search("'.*'", message.partition("\n")[0])
            if values:
                # Of a place that cannot be used, this says why.
                storage.path(values[0].strip("'"))
            said = f"{_name(argument)} does not take {values[0] if values else 'this value'}"
        case _:
            return
    raise HeadshareError(f"{said} ({event.prog} --help).")


def _name(argument: Any) -> str:
    return str(argument.lowered.metavar) if argument.is_positional() else argument.display_name()
