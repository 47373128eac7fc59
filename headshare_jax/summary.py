"""What became of a model, in five lines: what was done, sizes, quality, what it took, and what to run next."""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headshare_jax import convert
from headshare_jax.evaluate.agreement import Agreement
from headshare_jax.parameters import PROJECTIONS
from headshare_jax.report.progress import spoken
from headshare_jax.resources import gigabytes
from headshare_jax.sharing.ledger import disk_bytes, ledger
from headshare_jax.sharing.running import running
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import cast

# Positions of one text that the key/value cache is told for, in 16 bits.
CACHE_LENGTH = 4096


@dataclass(frozen=True)
class Sizes:
    """Bytes before and after, each pair of one kind.

    Attributes:
      files: on disk; None where there are none.
      weights: all parameters, before and after in the type of the output.
      attention: the q, k, v and o projections among them.
      cache: keys and values of 4,096 positions in 16 bits.
      type: of the output's parameters in memory.
      quantised: the types in which both are quantised on disk; None for plain floats.
    """

    files: tuple[int | None, int | None]
    weights: tuple[int, int]
    attention: tuple[int, int]
    cache: tuple[int, int]
    type: str
    quantised: tuple[str | None, str | None] = (None, None)

    @property
    def note(self) -> str | None:
        """Why the files became larger, and what keeps them small; None unless they did."""
        before, after = self.files
        if before is None or after is None or after <= 1.01 * before:
            return None
        if self.quantised[0] is not None and self.quantised[1] is None:
            return f"larger because the source is {self.quantised[0]}, which the format gguf keeps"
        if self.quantised[0] != self.quantised[1]:
            return f"larger because {self.quantised[1]} takes more than {self.quantised[0]}; quantize chooses the type"
        if self.weights[1] > self.weights[0]:
            return "larger because every head is written out; the formats native and hf-compact store each once"
        if self.quantised[0] or before >= self.weights[0]:
            return None
        return f"larger because it is in {self.type}; dtype chooses the type"

    def __str__(self) -> str:
        told = [f"{name} {_pair(*pair)}" for name, pair in (("files", self.files), ("weights", self.weights))]
        if self.files[1] is None:
            del told[0]
        told[-1] += f" in {self.type}"
        told.append(f"attention {_pair(*self.attention)}")
        before, after = self.cache
        cache = f"{gigabytes(after)} as before" if after == before else _pair(before, after)
        told.append(f"key/value cache {cache}")
        return ", ".join(told) + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Summary:
    """What a command did to a model.

    Attributes:
      output: the new model's name.
      done: what was done, in a few words.
      sizes: bytes before and after.
      quality: how the new model's predictions are to the old one's; None if that was not measured.
      text: what they were measured on.
      quality_note: what is said instead or besides.
      seconds: that it took.
      memory: most bytes of memory that the process had.
      next: the command to run next.
    """

    output: str
    done: str
    sizes: Sizes
    quality: Agreement | None
    text: str
    quality_note: str
    seconds: float
    memory: int
    next: str

    def __str__(self) -> str:
        measured = [] if self.quality is None else [f"{self.quality} ({self.text})"]
        return "\n".join(
            (
                f"{self.output}: {self.done}",
                f"size: {self.sizes}",
                f"quality: {'; '.join([*measured, *filter(None, [self.quality_note])])}",
                f"took {spoken(self.seconds)}, {gigabytes(self.memory)} of memory",
                f"next: {self.next}",
            )
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data, and the lines."""
        quality = None if self.quality is None else asdict(self.quality) | {"ratio": self.quality.ratio}
        return {
            "sizes": asdict(self.sizes) | {"note": self.sizes.note},
            "quality": quality,
            "quality_text": self.text or None,
            "seconds": self.seconds,
            "memory": self.memory,
            "next": self.next,
            "lines": str(self).splitlines(),
        }


def next_command(path: Path) -> str:
    """What to try a new model with."""
    return f"headshare chat {shlex.quote(str(path))}"


def sizes(source: WeightSource, before: Path | None, model: WeightSource, after: Path | None) -> Sizes:
    """Counts what a model had and what it has.

    Args:
      source: what the new model was made of.
      before: its files; None for a model in memory.
      model: the new one, as it is written.
      after: its files, if it was written.
    """
    config, dtype = model.config, model.dtype("embed_vd")
    alike = source if source.dtype("embed_vd") == dtype else cast(source, str(dtype))
    was, now = (running(config, each.sharing, context=CACHE_LENGTH, batch=1) for each in (source, model))
    return Sizes(
        files=(_on_disk(source, before), _on_disk(model, after)),
        weights=(ledger(alike).stored_bytes, ledger(model).stored_bytes),
        attention=(_attention_bytes(alike), _attention_bytes(model)),
        cache=(was.model.cache_bytes, now.model.cache_bytes),
        type=str(dtype),
        quantised=(convert.quantised_as(source), convert.quantised_as(model)),
    )


def _on_disk(source: WeightSource, path: Path | None) -> int | None:
    return None if path is None else disk_bytes(source, path)


def _attention_bytes(source: WeightSource) -> int:
    return sum(row.stored * row.bytes_per_parameter for row in ledger(source).rows if row.part in PROJECTIONS)


def _pair(before: int | None, after: int | None) -> str:
    if before is None or after is None or before == after:
        return gigabytes(after or before or 0)
    return f"{gigabytes(before)} -> {gigabytes(after)}"
