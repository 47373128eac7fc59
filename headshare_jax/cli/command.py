"""What all commands have in common: options, and one result, shown as text or as JSON."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro
from rich.console import Console, RenderableType

from headshare_jax.errors import HeadshareError

Source = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="SRC", help="Model: native or Hugging Face folder, .gguf file, or hub id (owner/model)."),
]
Destination = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="DST", help="Folder to make for the new model; a .gguf file for the format gguf."),
]
Overwrite = Annotated[bool, tyro.conf.arg(help="Replace outputs that exist.")]
StoredDtype = Annotated[
    str | None,
    tyro.conf.arg(
        help="Type to store: float32, bfloat16 or float16; by default the source's own, or bfloat16 where that is "
        "quantised."
    ),
]
ComputeDtype = Annotated[str, tyro.conf.arg(help="Type to compute in: float32 or bfloat16.")]


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its fields are its arguments, and what its docstring says of them is their help.

    Attributes:
      json: Print one JSON object on standard output, and nothing else there.
    """

    json: bool = False

    @classmethod
    def flags(cls) -> dict[str, str]:
        """The command's options, by the names of their fields."""
        return {
            field.name: f"--{field.name.replace('_', '-')}"
            for field in fields(cls)
            if tyro.conf.Positional not in getattr(field.type, "__metadata__", ())
        }

    def refuse(self, *options: str, without: str) -> None:
        """Raises HeadshareError for the first of these options that is given, since it would do nothing."""
        for field in fields(self):
            if field.name in options and getattr(self, field.name) != field.default:
                raise HeadshareError(f"{self.flags()[field.name]} does nothing without {without}; leave it out.")

    def execute(self) -> None:
        """Runs the command and prints its result."""
        result = self.run()
        if self.json:
            json.dump(plain(result), sys.stdout, allow_nan=False)
            print()
        else:
            console = Console()
            for part in self.show(result):
                console.print(part)

    def run(self) -> dict[str, Any]:
        """Does the work; returns plain data."""
        raise NotImplementedError

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        """The result as a person reads it."""
        raise NotImplementedError


def plain(value: Any) -> Any:
    """JSON has no infinities: they become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
