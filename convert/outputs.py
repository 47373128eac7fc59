"""What is written: formats, types of weights, and whether there is room, all known before the work begins."""

from collections.abc import Collection
from os.path import exists
from pathlib import Path
from typing import Any

from headshare_jax.convert import atomic, gguf_writer, partial, run_checkpoint, storage
from headshare_jax.errors import HeadshareError
from headshare_jax.resources import check_disk
from headshare_jax.sharing.ledger import ledger
from headshare_jax.sharing.source import WeightSource, path_of
from headshare_jax.sharing.view import DTYPES, cast

FORMATS = ("native", "hf", "hf-compact", "gguf")


def check_output(
    dst: str | Path | None,
    to: str,
    *,
    quantize: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    sources: Collection[Any] = (),
) -> None:
    """Raises HeadshareError unless format and types go together, and `dst`, if given, can become such an output.

    Args:
      dst, to, quantize, dtype, overwrite: as for `save`.
      sources: what the output is made from, which it must not replace: paths, and sources that may have one.
    """
    if to not in FORMATS:
        raise HeadshareError(f"The format {to!r} is not one of {', '.join(FORMATS)}.", option="to")
    if dtype is not None and dtype not in DTYPES:
        raise HeadshareError(f"The type {dtype!r} is not one of {', '.join(DTYPES)}.", option="dtype")
    if dtype is not None and quantize is not None:
        raise HeadshareError("Give the type of the output once: leave dtype or quantize out.", option="dtype")
    if to == "gguf":
        gguf_writer.check_type(quantize)
        if dst is not None and storage.path(dst).suffix != gguf_writer.ENDING:
            raise HeadshareError(f"A GGUF model is one file; give the output {dst} a name that ends in .gguf.")
    elif quantize is not None:
        raise HeadshareError(f"quantize is for the format gguf; leave it out for {to}.", option="quantize")
    elif dst is not None and storage.path(dst).suffix == gguf_writer.ENDING:
        raise HeadshareError(
            f"The format {to} is a folder; give the output {dst} another name, or write gguf.", option="to"
        )
    if dst is not None:
        atomic.check_output(storage.path(dst), folder=to != "gguf", overwrite=overwrite, keep=paths(sources))


def paths(sources: Collection[Any]) -> tuple[Path, ...]:
    """Where sources lie, as far as they are on disk."""
    named = (storage.path(source) if storage.is_name(source) else path_of(source) for source in sources)
    return tuple(path for path in named if path is not None and (storage.in_bucket(path) or exists(path)))


def check_room(
    source: WeightSource, dst: str | Path, *, to: str, dtype: str | None = None, quantize: str | None = None
) -> None:
    """Raises HeadshareError if the disk has no room for a source in a format, before any of it is read.

    A map saves too little to be counted: room for the dense model is asked for.
    """
    source = cast(source, dtype)
    needed = gguf_writer.expected_bytes(source, quantize) if to == "gguf" else ledger(source).dense_bytes
    path = storage.path(dst)
    if not storage.in_bucket(path):
        # What a killed process left is written over, or gone on with.
        needed -= min(needed, partial.left_bytes(path.resolve()))
        check_disk(path.resolve().parent, needed, f"The output {dst}")


def quantised_as(source: WeightSource) -> str | None:
    """The type that a checkpoint's matrices are quantised in on disk, as `q4_1` or `fp8`; None for plain floats."""
    found: str | None = getattr(getattr(source, "reader", None), "quantised_as", None)
    return found


def output_dtype(source: WeightSource, to: str, dtype: str | None = None) -> str | None:
    """The type that parameters are to be rounded to before they are written; None where each keeps its own.

    What is given, else what went in; a quantised source keeps its types in a GGUF file, and elsewhere becomes bfloat16.
    A run's checkpoint becomes what its run would write.
    """
    if dtype is None and (of_run := run_checkpoint.dtype_of(source)):
        return of_run
    return "bfloat16" if dtype is None and to != "gguf" and quantised_as(source) is not None else dtype
