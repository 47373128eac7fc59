"""What all commands have in common: options, and one result, shown as text or as JSON."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations
from typing import Annotated, Any, ClassVar, Self, get_origin

import tyro
from rich.console import RenderableType

from headshare_jax.cli import kinds
from headshare_jax.cli.exit_codes import ExitCode
from headshare_jax.convert import storage
from headshare_jax.errors import HeadshareError
from headshare_jax.processes.start import is_first
from headshare_jax.report.console import show

Source = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(
        metavar="SRC",
        help="Model: native or Hugging Face folder or .gguf file, also at gs:// or s3://; or hub id (owner/model).",
    ),
]
Destination = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="DST", help="Folder to make for the new model; a .gguf file for the format gguf."),
]
Overwrite = Annotated[bool, tyro.conf.arg(help="Replace outputs that exist.")]
StoredDtype = Annotated[
    kinds.Dtype | None,
    tyro.conf.arg(
        help="Type to store: float32, bfloat16 or float16; by default the source's own, or bfloat16 where that is "
        "quantised."
    ),
]
ComputeDtype = Annotated[kinds.ComputeDtype, tyro.conf.arg(help="Type to compute in: float32 or bfloat16.")]
MeshSizes = Annotated[
    tuple[kinds.MeshSize, kinds.MeshSize, kinds.MeshSize] | None,
    tyro.conf.arg(
        metavar="DATA FSDP TENSOR",
        help="Sizes of the mesh of devices to run on, one of which may be -1; by default all of this machine.",
    ),
]
# A default is shown where it is a value.
_HELP = tyro.conf.arg(help_behavior_hint=lambda value: "" if value in ("", "False") else f"(default: {value})")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its fields are its arguments, and what its docstring says of them is their help.

    Attributes:
      needs: options that do nothing unless one of some others is set.
      outputs: arguments that name what is written; none may lie in another.
      implied: options whose value may be left out, with the values that they take, the implied one first.
      given: the options that the command line names.
      json: Print one JSON object on standard output, and nothing else there.
    """

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    outputs: ClassVar[tuple[str, ...]] = ()
    implied: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    given: ClassVar[frozenset[str]] = frozenset()

    json: Annotated[bool, _HELP] = False

    def __init_subclass__(cls) -> None:
        for name, kind in cls.__annotations__.items():
            if ClassVar not in (kind, get_origin(kind)):
                cls.__annotations__[name] = Annotated[kind, _HELP]

    @classmethod
    def flags(cls) -> dict[str, str]:
        """The command's options, by the names of their fields."""
        return {field.name: f"--{field.name.replace('_', '-')}" for field in fields(cls) if not _is_positional(field)}

    @classmethod
    def spellings(cls) -> dict[str, set[str]]:
        """All the ways to write each option, with a hyphen between words."""
        flags = cls.flags()
        return {field.name: {flags[field.name], *_aliases(field)} for field in fields(cls) if field.name in flags}

    @classmethod
    def spelt_out(cls, words: Sequence[str]) -> list[str]:
        """A command line with every implied value in its place."""
        implied = {cls.flags()[name]: values for name, values in cls.implied.items()}
        spelt: list[str] = []
        for word, following in zip(words, [*words, ""][1:], strict=True):
            values = implied.get(word)
            spelt += [word] if values is None or following.lower() in values else [word, values[0]]
        return spelt

    def checked(self, given: frozenset[str]) -> Self:
        """The command with every value as its kind takes it.

        Args:
          given: the options that the command line names.

        Raises:
          HeadshareError: a value is none of its kind, an option would do nothing, or outputs lie in each other.
        """
        object.__setattr__(self, "given", given)
        flags = self.flags()
        for option, needed in self.needs.items():
            if all(getattr(self, name) in (None, False, ()) for name in needed):
                self.refuse(option, without=" or ".join(flags[name] for name in needed))
        names = {field.name: flags.get(field.name, _metavar(field)) for field in fields(self)}
        values = {
            field.name: kinds.checked(field.type, getattr(self, field.name), names[field.name])
            for field in fields(self)
        }
        places = {names[name]: storage.path(values[name]) for name in self.outputs if values[name] is not None}
        written = {name: path if storage.in_bucket(path) else path.absolute() for name, path in places.items()}
        for (one, path), (other, inside) in permutations(written.items(), 2):
            if storage.is_within(inside, path):
                raise HeadshareError(f"{other} is or lies in {one}, {path}; give each output a place of its own.")
        command = replace(self, **values)
        object.__setattr__(command, "given", given)
        return command

    def refuse(self, *options: str, without: str) -> None:
        """Raises HeadshareError for the first of these options that is given, since it would do nothing."""
        for option in options:
            if option in self.given:
                raise HeadshareError(f"{self.flags()[option]} does nothing without {without}; leave it out.")

    def execute(self) -> ExitCode:
        """Runs the command and prints its result, of several processes in the first one."""
        result = self.run()
        if not is_first():
            return self.exit_code(result)
        if self.json:
            print(json.dumps(plain(result), allow_nan=False))
        else:
            for part in self.show(result):
                show(part)
        return self.exit_code(result)

    def run(self) -> dict[str, Any]:
        """Does the work; returns plain data."""
        raise NotImplementedError

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        """The result as a person reads it."""
        raise NotImplementedError

    def exit_code(self, result: dict[str, Any]) -> ExitCode:
        """How the command ended that came to a result."""
        return ExitCode.DONE


def _is_positional(field: Any) -> bool:
    return tyro.conf.Positional in field.type.__metadata__


def _metavar(field: Any) -> str:
    """What a positional argument is called."""
    named = (getattr(part, "metavar", None) for part in field.type.__metadata__)
    return next(filter(None, named), field.name.upper()).strip("[]")


def _aliases(field: Any) -> set[str]:
    return {alias for part in field.type.__metadata__ for alias in getattr(part, "aliases", None) or ()}


def plain(value: Any) -> Any:
    """JSON has no infinities: they become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
