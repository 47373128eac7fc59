"""What all commands have in common: one result, shown as text or as JSON, and progress on standard error."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console, RenderableType

from headshare_jax.convert.cache import cache_directory

Source = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="SRC", help="Model: native or Hugging Face folder, .gguf file, or hub id (owner/model)."),
]
Destination = Annotated[
    tyro.conf.Positional[str], tyro.conf.arg(metavar="DST", help="Folder to make for the new model.")
]
Overwrite = Annotated[bool, tyro.conf.arg(help="Replace outputs that exist.")]
ComputeDtype = Annotated[str, tyro.conf.arg(help="Type to compute in: float32 or bfloat16.")]


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its fields are its arguments.

    Attributes:
      json: print one JSON object on standard output and nothing else there.
    """

    json: Annotated[bool, tyro.conf.arg(help="Print one JSON object on standard output, and nothing else there.")] = (
        False
    )

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


def keep_compiled() -> None:
    """Keeps what is compiled in the cache folder, so that later commands start without compiling.

    A folder that the user gave JAX stays in force, and where none can be made nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_directory() / "compiled"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def plain(value: Any) -> Any:
    """JSON has no infinities: they become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
