"""The record of a compression."""

import html
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headshare_jax.calibration.overlap import Overlap
from headshare_jax.calibration.text import CalibrationText
from headshare_jax.convert.card import public_name
from headshare_jax.evaluate.agreement import Agreement
from headshare_jax.fit.refit import RefitReport
from headshare_jax.sharing.ledger import Ledger
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource
from headshare_jax.summary import Sizes, Summary, next_command

# Above this ratio of perplexities a method that fits nothing is told to be the cause.
_RUINED = 1.05


@dataclass(frozen=True)
class Compressed:
    """What `compress` did; shows itself in five lines, and in a notebook with the map's picture.

    Attributes:
      model: the compressed model: a `Llama` if one was given, else a view of the source, of which `Llama.of` makes one.
      map: who shares with whom, and who is dropped.
      ledger: what the model stores, and what it stored before, in parameters.
      sizes: bytes before and after.
      fit: what the refit did, if the method refits.
      calibration: the text that the method was calibrated on, or the texts.
      quality: the model's predictions against the dense model's; None if they were not measured.
      measured_on: the text that they were measured on, or why not.
      overlap: what of that text was in the one that the method was calibrated on; None where there were not both.
      seconds: that all took.
      memory: most bytes of memory that the process had.
      path: the folder or file that was written, if one was.
    """

    model: WeightSource
    map: SharingMap
    ledger: Ledger
    sizes: Sizes
    fit: RefitReport | None
    calibration: CalibrationText | None
    quality: Agreement | None
    measured_on: str
    overlap: Overlap | None
    seconds: float
    memory: int
    path: Path | None

    @property
    def record(self) -> dict[str, Any] | None:
        """The record of the fit as plain data; None if nothing was fitted."""
        return None if self.fit is None else fit_record(self.calibration, self.fit)

    @property
    def summary(self) -> Summary:
        """What was done, in five lines."""
        text = "" if self.calibration is None else f" on {_amounts(self.calibration)}"
        note = "" if self.quality is not None else self.measured_on
        if self.quality is not None and self.quality.ratio > _RUINED and self.fit is None:
            note = "nothing was fitted to make up for it, as the method fitted does"
        elif self.overlap is not None and self.overlap.share:
            note = self.overlap.sentence("the text that it was fitted to").removesuffix(".")
        return Summary(
            output=str(self.path) if self.path else "in memory",
            done=f"{self.map.summary()} ({self.map.method}{text})",
            sizes=self.sizes,
            quality=self.quality,
            text="" if self.quality is None else self.measured_on,
            quality_note=note,
            seconds=self.seconds,
            memory=self.memory,
            next="hs.save(done.model, ...)" if self.path is None else next_command(self.path),
        )

    def __repr__(self) -> str:
        return str(self.summary)

    def _repr_html_(self) -> str:
        # Matplotlib takes a while to import.
        from headshare_jax.report.map import map_svg

        lines = "<br>".join(html.escape(line) for line in str(self.summary).splitlines())
        return f"<p>{lines}</p>{map_svg(self.map)}"


def _amounts(calibration: CalibrationText) -> str:
    """How many tokens were calibrated on, and of several texts how many of each."""
    told = f"{calibration.windows_wt.size:,} tokens"
    if len(calibration.parts) == 1:
        return told
    return f"{told}: " + ", ".join(f"{part.windows_wt.size:,} of {part.name}" for part in calibration.parts)


def fit_record(calibration: CalibrationText | None, report: RefitReport) -> dict[str, Any]:
    """A fit as plain data, with the name of its text, or the names of several."""
    names = [] if calibration is None else [public_name(part.name) for part in calibration.parts]
    return {"calibrate": " and ".join(names) or None, **asdict(report)}
