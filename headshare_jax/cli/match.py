"""`headshare match`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import tyro
from rich.console import RenderableType
from rich.table import Table

from headshare_jax import convert
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command, Overwrite, Source
from headshare_jax.convert.atomic import check_output, new_file
from headshare_jax.errors import HeadshareError
from headshare_jax.matching.cosine import match
from headshare_jax.report.heatmap import draw_scores
from headshare_jax.report.picture import check_name
from headshare_jax.report.progress import progress
from headshare_jax.sharing.scores import MatchResult

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Match(Command):
    """Score all pairs of sharing units, and find the best donor of each in an earlier layer.

    Example: headshare match SmolLM2-135M.gguf --match qk -o scores.npz --plot heatmap.png

    Attributes:
      match: Score of a pair: cosine of q, k, v, qk, qkv or total weights; or random, a baseline.
      seed: Seed of the random baseline.
      output: Where to write donor_layer, donor_unit and value [L, U] (.npz).
      plot: Where to draw the scores of all pairs (.png, .svg or .pdf).
    """

    outputs: ClassVar = ("output", "plot")
    needs: ClassVar = {"overwrite": ("output", "plot")}

    src: Source
    match: kinds.MatchFunction = "qk"
    seed: kinds.Seed = 0
    output: Annotated[Path | None, tyro.conf.arg(aliases=("-o",))] = None
    plot: Path | None = None
    overwrite: Overwrite = False

    def run(self) -> dict[str, Any]:
        if self.match != "random":
            self.refuse("seed", without="--match random")
        for path in filter(None, (self.output, self.plot)):
            check_output(path, folder=False, overwrite=self.overwrite)
        if self.plot is not None:
            check_name(self.plot)
        if self.output is not None and self.output.suffix != ".npz":
            raise HeadshareError(f"The scores are written as .npz, so their name must end so, unlike {self.output}.")
        result = matched(convert.open_checkpoint(self.src), self.match, self.seed)
        if self.output is not None:
            with new_file(self.output, overwrite=self.overwrite) as path, path.open("wb") as file:
                np.savez(file, **{name: getattr(result, name) for name in ("donor_layer", "donor_unit", "value")})
        if self.plot is not None:
            with new_file(self.plot, overwrite=self.overwrite) as path:
                draw_scores(result).save(path)
        outputs = {"output": self.output, "plot": self.plot}
        return _summary(result) | {name: path and str(path) for name, path in outputs.items()}

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        low, middle, high = result["value_quantiles"].values()
        yield (
            f"{result['layers']} layers of {result['units']} units, matched by {result['match']}; "
            f"best score of a unit: lowest {low:.4f}, median {middle:.4f}, highest {high:.4f}"
        )
        table = Table("receiver (layer.unit)", "donor", "score", title="best pairs")
        for pair in result["best_pairs"]:
            table.add_row("{}.{}".format(*pair["receiver"]), "{}.{}".format(*pair["donor"]), f"{pair['score']:.4f}")
        yield table
        for name in ("output", "plot"):
            if result[name]:
                yield f"written: {result[name]}"


def matched(source: convert.Checkpoint, function: str, seed: int) -> MatchResult:
    """Matches with a progress bar."""
    with progress(f"matching by {function}") as step:
        return match(source, function, seed=seed, progress=step)


def _summary(result: MatchResult) -> dict[str, Any]:
    layers, units = result.value.shape
    donor, value = result.donor.ravel().tolist(), result.value.ravel()
    # The first layer has no donors.
    best = (np.argsort(-value[units:], kind="stable")[:_SHOWN] + units).tolist()
    quantiles = np.quantile(value[units:], [0, 0.5, 1]).tolist()
    return {
        "match": result.match,
        "layers": layers,
        "units": units,
        "source": result.source,
        "value_quantiles": dict(zip(("lowest", "median", "highest"), quantiles, strict=True)),
        "best_pairs": [
            {"receiver": divmod(flat, units), "donor": divmod(donor[flat], units), "score": float(value[flat])}
            for flat in best
        ],
    }
