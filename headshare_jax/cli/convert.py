"""`headshare convert`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import RenderableType

from headshare_jax import conversion, convert
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command, Destination, Overwrite, Source, StoredDtype
from headshare_jax.cli.sharing import SeqLen
from headshare_jax.convert import run_checkpoint


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Convert a model between formats, tensor by tensor.

    Example: headshare convert meta-llama/Llama-2-7b-hf llama-2-7b --to native

    A PostShare run's folder is converted from its newest checkpoint, as the run would end with it.

    Attributes:
      to: native, hf (plain, full size), hf-compact (each head once) or gguf (one file, for llama.cpp).
      quantize: Type of the matrices in a GGUF file, such as q8_0, q4_1 or f16; each keeps its own by default.
      step: Of a PostShare run, the step of the checkpoint to convert; the newest by default.
      text: Text to measure both models on, as for eval; by default nothing is measured.
    """

    src: Source
    dst: Destination
    needs: ClassVar = {"seq_len": ("text",)}

    to: kinds.Format
    quantize: kinds.GgufType | None = None
    dtype: StoredDtype = None
    step: kinds.Count | None = None
    text: kinds.TextName | None = None
    seq_len: SeqLen = 512
    overwrite: Overwrite = False

    def run(self) -> dict[str, Any]:
        src = self.src
        if self.step is not None:
            src = str(run_checkpoint.chosen(convert.locate(src), self.step))
        done = conversion.convert_model(
            src, self.dst, to=self.to, dtype=self.dtype, quantize=self.quantize, evaluate=self.text,
            seq_len=self.seq_len, overwrite=self.overwrite,
        )  # fmt: skip
        return {
            "output": self.dst,
            "format": self.to,
            "step": done.step,
            "parameters": done.ledger.stored,
            "disk_bytes": done.ledger.disk_bytes,
            "shared": done.model.sharing is not None,
            **done.summary.to_json(),
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        yield "\n".join(result["lines"])
