"""`headshare convert`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from headshare_jax import convert
from headshare_jax.cli.command import Command, Destination, Overwrite, Source
from headshare_jax.sharing.ledger import ledger, megabytes
from headshare_jax.sharing.view import cast


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Convert a model between formats, tensor by tensor.

    Example: headshare convert meta-llama/Llama-2-7b-hf llama-2-7b --to native

    Attributes:
      to: native, hf (plain, full size), hf-compact (each head once) or gguf (one file, for llama.cpp).
      quantize: Type of the matrices in a GGUF file, such as q8_0, q4_1 or f16; each keeps its own by default.
      dtype: Type to store: float32, bfloat16 or float16; the source's own by default.
    """

    src: Source
    dst: Destination
    to: str
    quantize: str | None = None
    dtype: str | None = None
    overwrite: Overwrite = False

    def run(self) -> dict[str, Any]:
        path = convert.locate(self.src)
        opened = convert.open_checkpoint(path)
        source = cast(opened, self.dtype)
        convert.save(
            source,
            self.dst,
            to=self.to,
            quantize=self.quantize,
            tokenizer_from=path,
            overwrite=self.overwrite,
            # What a native checkpoint was first made from is told on.
            provenance={"source": self.src} | getattr(opened, "provenance", {}),
        )
        sizes = ledger(source, path=Path(self.dst))
        return {
            "output": self.dst,
            "format": self.to,
            "parameters": sizes.stored,
            "disk_bytes": sizes.disk_bytes,
            "shared": opened.sharing is not None,
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        yield f"{result['output']}: {result['format']}, {megabytes(result['disk_bytes'])} on disk"
        if self.to == "hf" and result["shared"]:
            yield "A plain checkpoint holds every head, also those that share: it is at its full size."
