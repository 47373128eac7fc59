"""A program compiled for chips that need not be there: what it needs on one of them, and its text."""

import logging
import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from headshare_jax.errors import HeadshareError
from headshare_jax.plan.topology import compile_program

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """A program as XLA compiled it, or refused to for the memory that it would need.

    Attributes:
      needed_bytes: of a chip's memory, in all: arguments, outputs that take no argument's place, temporaries, code.
      argument_bytes: None where the program was refused.
      temporary_bytes: likewise.
      text: likewise, and where XLA cannot write down what it compiled.
      seconds: that compiling took.
    """

    needed_bytes: int
    argument_bytes: int | None
    temporary_bytes: int | None
    text: str | None
    seconds: float


def compiled(lowered: jax.stages.Lowered) -> Program:
    """Compiles a program for the devices that it was lowered for.

    Raises:
      HeadshareError: XLA does not tell what it needs.
    """
    start = time.perf_counter()
    try:
        result = compile_program(lowered)
    except jax.errors.JaxRuntimeError as error:
        return Program(_refused_bytes(error), None, None, None, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory = result.memory_analysis()
    if memory is None:
        raise HeadshareError(
            "XLA does not tell what the compiled step needs; estimate it from the shapes.", option="host"
        )
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Program(needed_bytes(memory), *sizes, _text(result), seconds)


def needed_bytes(memory: Any) -> int:
    """Bytes that a program needs in all, by what `Compiled.memory_analysis` tells of it."""
    new_output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed: int = memory.argument_size_in_bytes + new_output + memory.temp_size_in_bytes
    return needed + int(memory.generated_code_size_in_bytes)


def _text(program: jax.stages.Compiled) -> str | None:
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError as error:
        logger.warning(
            "XLA cannot write down what it compiled, whose costs are estimated (%s).", str(error).splitlines()[0]
        )
        return None


def _refused_bytes(error: jax.errors.JaxRuntimeError) -> int:
    """Bytes that a program needs which XLA refused for its memory; any other error is raised again."""
    found = re.search(r"RESOURCE_EXHAUSTED.*?total memory required[^(]*\(([\d.]+)([KMGT])\)", str(error), re.DOTALL)
    if found is None:
        raise error
    return round(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2]))))
