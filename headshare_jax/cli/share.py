"""`headshare share`."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import RenderableType
from rich.table import Table

from headshare_jax.cli.command import Command, Destination, Overwrite, Source
from headshare_jax.cli.inspect import ledger_table
from headshare_jax.cli.sharing import Calibrate, CalibrateTokens, MatchFunction, Seed, SeqLen, Tie
from headshare_jax.compression import compress
from headshare_jax.convert.atomic import check_output, new_file
from headshare_jax.fit.methods import METHODS
from headshare_jax.report.map import draw_map
from headshare_jax.report.picture import check_name
from headshare_jax.sharing.ledger import NOT_SAVED

# Options that are not arguments of `compress`, as all others are.
_OWN = ("json", "save_map", "plot")


@dataclass(frozen=True, kw_only=True)
class Share(Command):
    """Let the most similar heads share weights, without training.

    Example: headshare share SmolLM2-135M.gguf smollm2-shared --ratio 0.3

    Attributes:
      ratio: Sharing ratio in [0, 1): the part of all units that become receivers.
      budget: Instead of a ratio: the part of the attention parameters to keep, in (0, 1].
      model_budget: Instead of a ratio: the part of the model's parameters to keep; only attention gives any up.
      map: Use this sharing map instead of matching.
      chains: resolve (by default): a donor that receives is replaced by its root; forbid (fitted): no donor receives.
      within_shards: Choose donors in their receivers' shard only: so many chips share out the heads of a layer evenly.
      to: Format of the output: native, hf, hf-compact or gguf.
      quantize: Type of the matrices in a GGUF file, such as q8_0, q4_1 or f16; each keeps its own by default.
      work: Keep what is computed on the text in this folder, layer by layer, to go on from there after a stop, and to
        match no second time for another ratio, budget or method.
      save_map: Where to write the sharing map (.json) besides.
      plot: Where to draw who shares with whom (.png, .svg or .pdf).
    """

    src: Source
    dst: Destination
    ratio: float | None = None
    budget: float | None = None
    model_budget: float | None = None
    map: Path | None = None
    method: Annotated[
        str, tyro.conf.arg(help="; ".join(f"{method.name}: {method.summary}" for method in METHODS.values()) + ".")
    ] = "direct"
    calibrate: Calibrate = None
    calibrate_tokens: CalibrateTokens = 12288
    seq_len: SeqLen = 512
    match: MatchFunction = None
    seed: Seed = None
    tie: Tie = None
    chains: str | None = None
    within_shards: int | None = None
    to: str = "native"
    quantize: str | None = None
    work: Path | None = None
    save_map: Path | None = None
    plot: Path | None = None
    overwrite: Overwrite = False

    def run(self) -> dict[str, Any]:
        if self.calibrate is None:
            self.refuse("calibrate_tokens", "seq_len", without="--calibrate")
        for output in filter(None, (self.save_map, self.plot)):
            check_output(output, folder=False, overwrite=self.overwrite)
        if self.plot is not None:
            check_name(self.plot)
        done = compress(**{field.name: getattr(self, field.name) for field in fields(self) if field.name not in _OWN})
        if self.save_map is not None:
            with new_file(self.save_map, overwrite=self.overwrite) as path:
                path.write_text(done.map.to_json())
        if self.plot is not None:
            with new_file(self.plot, overwrite=self.overwrite) as path:
                draw_map(done.map).save(path)
        return {
            "output": self.dst,
            "format": self.to,
            "summary": done.map.summary(),
            "receivers": len(done.map.receivers),
            "dropped": int(done.map.dropped.sum()),
            "units": done.map.donor.size,
            **{name: getattr(done.map, name) for name in ("ratio", "budget", "tie", "method", "match")},
            "fit": done.record,
            "ledger": done.sizes.to_json(),
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        yield f"{result['output']}: {result['summary']}"
        if result["fit"] is not None:
            yield fit_table(result["fit"])
        yield ledger_table(result["ledger"])
        yield NOT_SAVED
        if self.to in ("hf", "gguf") and result["receivers"]:
            yield "The output holds every head, also those that share: on disk it is at its full size."


def fit_table(record: dict[str, Any]) -> Table:
    """Errors of every layer that was fitted, before and after."""
    title = f"distance from the dense model, {record['windows']} x {record['seq_len']} tokens of {record['calibrate']}"
    table = Table("layer", "block", "rows fitted", "before", "after", "held out: before", "after", title=title)
    for fit in record["blocks"]:
        errors = [fit[name] for name in ("error_before", "error_after", "held_out_before", "held_out_after")]
        rows = f"{fit['fitted_rows']} of {fit['rows']}"
        table.add_row(str(fit["layer"]), fit["block"], rows, *(f"{error:.3f}" for error in errors))
    return table
