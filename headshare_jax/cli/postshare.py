"""`headshare postshare`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import tyro
import yaml
from rich.console import RenderableType
from rich.syntax import Syntax
from rich.table import Table

from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command
from headshare_jax.cli.exit_codes import ExitCode
from headshare_jax.errors import HeadshareError
from headshare_jax.plan.footprint import footprint
from headshare_jax.report.progress import progress_with_text
from headshare_jax.sharing.ledger import megabytes
from headshare_jax.train import loop
from headshare_jax.train import recipe as recipes
from headshare_jax.train.run_folder import FINAL


@dataclass(frozen=True, kw_only=True)
class Postshare(Command):
    """Post-train a model so that its heads can share weights (PostShare), then share them.

    Example: headshare postshare --config smollm2-cpu --output run --set model=my-llama data.train=train.txt

    Attributes:
      output: Folder of the run.
      set: Values to use instead of the recipe's.
      resume: Go on after the newest checkpoint of the run.
      dry_run: Check model and texts, show the recipe and the memory it needs on a device; train nothing.
      distributed: One process of many; the others are found by themselves on TPU pods, Slurm and GKE.
      coordinator: With --distributed elsewhere: address:port of the first process.
      processes: With --coordinator: number of processes.
      process: With --coordinator: number of this process, from 0.
    """

    needs: ClassVar = {
        "coordinator": ("distributed",),
        "processes": ("coordinator",),
        "process": ("coordinator",),
    }

    config: Annotated[
        str, tyro.conf.arg(help=f"Recipe: a .yaml file, or one that comes along: {', '.join(recipes.SHIPPED)}.")
    ]
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    resume: bool = False
    dry_run: bool = False
    distributed: bool = False
    coordinator: str | None = None
    processes: kinds.Count | None = None
    process: kinds.Natural | None = None

    def run(self) -> dict[str, Any]:
        recipe = recipes.load(self.config, self.set)
        if self.distributed:
            try:
                jax.distributed.initialize(self.coordinator, self.processes, self.process)
            except (ValueError, RuntimeError) as error:
                raise HeadshareError(f"The other processes cannot be joined: {error}") from error
        if self.dry_run:
            return {"recipe": yaml.safe_load(recipes.to_yaml(recipe)), **footprint(recipe)}
        with progress_with_text() as show:
            last = loop.run(
                recipe,
                self.output,
                resume=self.resume,
                report=lambda line: show(line["step"], recipe.total_steps, _told(line)),
                progress=lambda what, done, total: show(done, total, what),
            )
        return {"output": str(self.output), "final": str(self.output / FINAL) if last else None, "last": last}

    def exit_code(self, result: dict[str, Any]) -> ExitCode:
        # What starts it anew after a preemption must not take it for done.
        return ExitCode.DONE if self.dry_run or result["last"] is not None else ExitCode.TERMINATED

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        if self.dry_run:
            yield Syntax(yaml.safe_dump(result["recipe"], sort_keys=False), "yaml", background_color="default")
            table = Table("bytes on a device", *(stage["kind"] for stage in result["stages"]))
            for name in ("parameters", "teacher", "optimizer", "temporaries", "total"):
                table.add_row(name, *(megabytes(stage[name]) for stage in result["stages"]))
            yield table
            return
        last = result["last"]
        if last is None:
            yield f"{result['output']}: stopped, with a checkpoint of the last step; --resume goes on from there"
            return
        perplexity = last.get("shared_perplexity")
        held_out = "" if perplexity is None else f", held-out perplexity after sharing {perplexity:.2f}"
        yield f"{result['final']}: the shared model after {last['step']} steps{held_out}"
        if last["spikes"]:
            yield f"The loss stood out at step {', '.join(map(str, last['spikes']))}."
        yield f"metrics: {result['output']}/metrics.jsonl, metrics.png; next: headshare inspect {result['final']}"


def _told(line: dict[str, Any]) -> str:
    parts = [f"{line['stage']} next-token loss {line['lm_loss']:.3f}"]
    shown = {"sim_loss": "penalty", "shared_perplexity": "perplexity"}
    parts += [f"{label} {line[name]:.2f}" for name, label in shown.items() if line.get(name)]
    if line["skipped"]:
        parts.append("skipped: not finite")
    return ", ".join([*parts, f"{line['tokens_per_second']:,.0f} tokens/s"])
