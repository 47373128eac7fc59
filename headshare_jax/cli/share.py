"""`headshare share`."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from rich.console import RenderableType

from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command, Destination, MeshSizes, Overwrite, Source, StoredDtype
from headshare_jax.cli.sharing import Calibrate, Even, MatchFunction, MeasuredText, NoEval, Seed, Tie, calibration
from headshare_jax.compression.compress import compress
from headshare_jax.convert.atomic import check_output, new_file
from headshare_jax.methods.table import METHODS
from headshare_jax.methods.work import Method
from headshare_jax.model.mesh import local_mesh
from headshare_jax.report.map import draw_map
from headshare_jax.report.picture import check_name
from headshare_jax.slim.choose import EVEN

# Options that are not arguments of `compress`, as all others are.
_OWN = ("json", "save_map", "plot", "text", "no_eval", "mesh", "calibrate")


def _time(method: Method) -> str:
    return f"about {method.minutes} min" if method.minutes else "seconds"


@dataclass(frozen=True, kw_only=True)
class Share(Command):
    """Make a model smaller without training: let heads share weights, or drop them, and fit the rest to make up for it.

    Example: headshare share SmolLM2-135M.gguf smollm2-small --ratio 0.1 --calibrate text.txt

    Attributes:
      ratio: Sharing ratio in [0, 1): the part of all units that become receivers or are dropped; plan and slim, which
        choose what each unit gives up, take a budget instead.
      budget: Instead of a ratio: the part of the attention parameters to keep, in (0, 1].
      model_budget: Instead of a ratio: the part of the model's parameters to keep; only attention gives any up.
      map: Use this sharing map instead of matching.
      chains: resolve (by default): a donor that receives is replaced by its root; forbid (fitted): no donor receives.
      within_shards: So many chips share out the heads of a layer evenly: donors are in their receivers' shards only,
        and slim units take up as much in each.
      to: Format of the output: native, hf, hf-compact or gguf.
      quantize: Type of the matrices in a GGUF file, such as q8_0, q4_1 or f16; each keeps its own by default.
      work: Keep what is computed on the text in this folder, layer by layer, to go on from there after a stop, and to
        match no second time for another ratio, budget or method.
      save_map: Where to write the sharing map (.json) besides.
      plot: Where to draw who shares with whom (.png, .svg or .pdf).
    """

    outputs: ClassVar = ("dst", "save_map", "plot")
    implied: ClassVar = {"even": EVEN}

    src: Source
    dst: Destination
    ratio: kinds.Ratio | None = None
    budget: kinds.Budget | None = None
    model_budget: kinds.Budget | None = None
    map: kinds.InputFile | None = None
    method: Annotated[
        kinds.MethodName | None,
        tyro.conf.arg(
            help="By default fitted for a ratio, plan for a budget, refit for a map. "
            + "; ".join(f"{method.name}: {method.summary} ({_time(method)})" for method in METHODS.values())
            + ". Times are of two CPU cores, for a billion parameters and 49,152 tokens."
        ),
    ] = None
    calibrate: Calibrate = ()
    calibrate_tokens: Annotated[
        kinds.Count | None,
        tyro.conf.arg(help="Tokens of these texts to use, from their starts; 49,152, or all of a single shorter one."),
    ] = None
    seq_len: Annotated[
        kinds.WindowLength | None, tyro.conf.arg(help="Tokens in a window of text; 512, or what a shorter context has.")
    ] = None
    own: Annotated[
        kinds.Ratio | None,
        tyro.conf.arg(
            help="Part of the calibration text that the model writes itself beside a single --calibrate: by default "
            "0.25 for plan and slim, whose models then do better on other kinds of text, else 0."
        ),
    ] = None
    text: MeasuredText = None
    no_eval: NoEval = False
    match: MatchFunction = None
    seed: Seed = None
    tie: Tie = None
    chains: Annotated[str, kinds.OneOf("resolve", "forbid")] | None = None
    within_shards: kinds.Count | None = None
    even: Even = None
    to: kinds.Format = "native"
    dtype: StoredDtype = None
    quantize: kinds.GgufType | None = None
    work: Path | None = None
    save_map: Path | None = None
    plot: Path | None = None
    mesh: MeshSizes = None
    overwrite: Overwrite = False

    def run(self) -> dict[str, Any]:
        if self.no_eval:
            self.refuse("text", without="an evaluation")
        for output in filter(None, (self.save_map, self.plot)):
            check_output(output, folder=False, overwrite=self.overwrite)
        if self.plot is not None:
            check_name(self.plot)
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _OWN}
        done = compress(
            **given,
            calibrate=calibration(self.calibrate),
            mesh=local_mesh(self.mesh),
            evaluate=self.text or not self.no_eval,
        )
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
            "slim": int(done.map.slim.sum()),
            "units": done.map.donor.size,
            **{name: getattr(done.map, name) for name in ("ratio", "budget", "tie", "method", "match")},
            **done.summary.to_json(),
            "fit": done.record,
            "ledger": done.ledger.to_json(),
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        yield "\n".join(result["lines"])
