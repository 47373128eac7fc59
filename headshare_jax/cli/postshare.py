"""`headshare postshare`."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
import yaml
from rich.console import RenderableType
from rich.syntax import Syntax
from rich.table import Table

from headshare_jax import convert
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command
from headshare_jax.cli.exit_codes import ExitCode
from headshare_jax.evaluate.agreement import Agreement
from headshare_jax.plan.footprint import footprint
from headshare_jax.processes.start import joined
from headshare_jax.report.console import kept_for_result
from headshare_jax.report.progress import Course, Show, Step, progress_with_text, say, spoken
from headshare_jax.resources import megabytes, peak_memory
from headshare_jax.signals import insistent
from headshare_jax.summary import Summary, next_command, sizes
from headshare_jax.train import loop, run_folder
from headshare_jax.train import recipe as recipes
from headshare_jax.train.inputs import Progress


@dataclass(frozen=True, kw_only=True)
class Postshare(Command):
    """Post-train a model so that its heads can share weights (PostShare), then share them.

    Example: headshare postshare --config smollm2-cpu --output run --set model=my-llama data.train=train.txt

    Attributes:
      output: Folder of the run.
      set: Values to use instead of the recipe's.
      resume: Go on after the newest checkpoint of the run.
      dry_run: Check model and texts, show the recipe and the memory it needs on a device; train nothing.
      distributed: One process of many; the others are found by themselves on TPU pods, Slurm and GKE, for which
        headshare_jax/train/launch has files.
      coordinator: With --distributed elsewhere: address:port of the first process.
      processes: With --coordinator: number of processes.
      process: With --coordinator: number of this process, from 0.
      profile: First of three steps whose trace is written to the folder's `profile`, for XProf.
      wandb: Project at Weights & Biases to send the metrics to.
      join_within: Seconds in which all processes must have come.
    """

    needs: ClassVar = {
        "coordinator": ("distributed",),
        "processes": ("coordinator",),
        "process": ("coordinator",),
        "join_within": ("distributed",),
    }

    config: Annotated[
        str, tyro.conf.arg(help=f"Recipe: a .yaml file, or one that comes along: {', '.join(recipes.SHIPPED)}.")
    ]
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    resume: bool = False
    dry_run: bool = False
    profile: kinds.Count | None = None
    wandb: str | None = None
    distributed: bool = False
    coordinator: str | None = None
    processes: kinds.Count | None = None
    process: kinds.Natural | None = None
    join_within: kinds.Count = 300

    def run(self) -> dict[str, Any]:
        recipe = recipes.load(self.config, self.set)
        with ExitStack() as stack:
            stack.enter_context(insistent())
            if self.distributed:
                stack.enter_context(kept_for_result())
                stack.enter_context(joined(self.coordinator, self.processes, self.process, within=self.join_within))
            return self._run(recipe)

    def _run(self, recipe: recipes.Recipe) -> dict[str, Any]:
        if self.dry_run:
            return {"recipe": yaml.safe_load(recipes.to_yaml(recipe)), **footprint(recipe)}
        started = time.monotonic()
        with progress_with_text() as show, ExitStack() as phases:
            last = loop.run(
                recipe,
                self.output,
                resume=self.resume,
                profile=self.profile,
                wandb=self.wandb,
                report=partial(_report, show, recipe.total_steps),
                progress=_phases(show, phases),
            )
        result = {"output": str(self.output), "final": None, "last": last}
        if last is None:
            return result
        final = run_folder.final(self.output, recipe)
        source, model = (convert.open_checkpoint(path) for path in (recipe.model, final))
        found = last.get("agreement")
        summary = Summary(
            output=str(final),
            done=_done(last, model),
            sizes=sizes(source, source.path, model, final),
            quality=None if found is None else Agreement(**found),
            text=recipe.data.eval or "",
            quality_note=_quality_note(last, recipe.data.eval),
            seconds=time.monotonic() - started,
            memory=peak_memory(),
            next=next_command(final),
        )
        return result | {"final": str(final), **summary.to_json()}

    def exit_code(self, result: dict[str, Any]) -> ExitCode:
        # What starts it anew after a preemption must not take it for done.
        return ExitCode.DONE if self.dry_run or result["last"] is not None else ExitCode.TERMINATED

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        if self.dry_run:
            yield Syntax(yaml.safe_dump(result["recipe"], sort_keys=False), "yaml", background_color="default")
            table = Table("bytes on a device", *(stage["kind"] for stage in result["stages"]))
            for name in ("parameters", "teacher", "optimizer", "temporaries", "total", "beginning"):
                table.add_row(name, *(megabytes(stage[name]) for stage in result["stages"]))
            yield table
            return
        if result["last"] is None:
            yield f"{result['output']}: stopped, with a checkpoint of the last step; --resume goes on from there"
            return
        yield "\n".join(result["lines"])


def _done(last: dict[str, Any], model: convert.Checkpoint) -> str:
    """What a run did."""
    assert model.sharing is not None
    spikes = f"; the loss stood out at step {', '.join(map(str, last['spikes']))}" if last["spikes"] else ""
    return (
        f"{model.sharing.summary()}; {last['step']} steps of training, {last['skipped_steps']} of them skipped as not "
        f"finite{spikes}; {last['goodput']:.0%} of the time in steps"
    )


def _quality_note(last: dict[str, Any], text: str | None) -> str:
    """The shared model before training; or why its quality is not told."""
    if text is None:
        return "not measured, as the recipe names no held-out text (data.eval)"
    if last.get("agreement") is None:
        return f"{_perplexities(last)} ({text})"
    return f"before training {_number(last.get('start_perplexity'))}"


def _perplexities(line: dict[str, Any]) -> str:
    """The shared model's perplexity beside the dense one's."""
    dense, shared = line.get("source_perplexity"), line.get("shared_perplexity")
    ratio = f" ({shared / dense:.2f}x)" if dense and shared else ""
    return f"perplexity dense {_number(dense)}, shared {_number(shared)}{ratio}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.2f}"


def _report(show: Show, total: int, line: dict[str, Any]) -> None:
    """Shows a step, and leaves a line where the models were measured."""
    if "shared_perplexity" in line:
        say(f"step {line['step']}: {_perplexities(line)}")
    if line["step"]:
        show(line["step"], total, _told(line))


def _phases(show: Show, stack: ExitStack) -> Progress:
    """Shows what comes before and after the steps, each with the time left."""
    steps: dict[str, Step] = {}

    def tell(what: str, done: int, total: int) -> None:
        if what not in steps:
            steps[what] = stack.enter_context(Course({what: 1.0}, show).phase(what))
        steps[what](done, total)

    return tell


def _told(line: dict[str, Any]) -> str:
    """A step as a line of progress shows it."""
    parts = [f"{line['stage']}: next-token loss {line['lm_loss']:.3f}"]
    if line.get("sim_loss"):
        parts.append(f"penalty {line['sim_loss']:.2f}")
    if line["skipped"]:
        parts.append("skipped: not finite")
    return ", ".join([*parts, f"{line['tokens_per_second']:,.0f} tokens/s", *_left(line["seconds_left"])])


def _left(seconds: list[float] | None) -> list[str]:
    if seconds is None:
        return []
    rest = f" of this stage, {spoken(sum(seconds))} of the run" if len(seconds) > 1 else ""
    return [f"about {spoken(seconds[0])} left{rest}"]
