"""A PostShare run: stages, steps, evaluation, checkpoints and metrics. The work itself is done in `step`."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from headshare_jax.errors import HeadshareError
from headshare_jax.model.mesh import replicated
from headshare_jax.model.share import share
from headshare_jax.parameters import pool_name
from headshare_jax.processes.agreement import together
from headshare_jax.processes.start import leave, set_remedy
from headshare_jax.processes.stop import Stop
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import SharedView
from headshare_jax.signals import handled
from headshare_jax.train import recipe as recipes
from headshare_jax.train import run_folder
from headshare_jax.train.checkpoints import RunCheckpoints, Save
from headshare_jax.train.current import Current
from headshare_jax.train.export import export
from headshare_jax.train.held_out import HeldOut
from headshare_jax.train.inputs import Progress, Run, check_devices, prepare
from headshare_jax.train.losses import pair_cosine, tied_projections
from headshare_jax.train.metrics import MetricsLog, Speed, check_wandb, is_spike
from headshare_jax.train.profile import Profile, check_profile
from headshare_jax.train.same import beginning, inputs
from headshare_jax.train.stage_steps import StageSteps
from headshare_jax.train.time_left import TimeLeft

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


def run(
    recipe: recipes.Recipe,
    output: Path,
    *,
    resume: bool = False,
    profile: int | None = None,
    wandb: str | None = None,
    report: Report = lambda metrics: None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any] | None:
    """Trains as the recipe says; returns the metrics of the last step, or None if it was stopped before that.

    Those metrics are joined by `spikes`, the steps whose loss stood out; `skipped_steps`, how many were not finite; and
    with a held-out text by `source_perplexity`, `start_perplexity` (before any training) and `agreement`, the final
    model beside the dense one that the run began with. Where the last stage is `align` and the recipe refits,
    `shared_perplexity` is the refitted model's. `goodput` is the share of the time that went into steps, compiling
    left out.

    The folder `output` gets `config.yaml`, `map.json`, `baseline.json` (the perplexities before training),
    `metrics.jsonl` (a line a step), `checkpoints/`, `refit.json` (a `RefitReport`) if the recipe refits, and `final/`,
    the shared model. On SIGTERM and Ctrl-C it saves a checkpoint
    and stops. Every process of a distributed run calls this.

    Args:
      recipe: the run.
      output: folder of the run; new unless `resume`.
      resume: go on after the newest checkpoint in `output`, whose recipe must be the same but for the mesh.
      profile: first of three steps whose trace, for XProf, is written to `profile/` in `output`.
      wandb: project at Weights & Biases that the metrics are sent to, too.
      report: called with every step's metrics, and `seconds_left`: of its stage and of each after it, or None. Before
        the first step it is called with the perplexities alone, as of step 0.
      progress: called before the first step and during a refit, with what is being done, how much of it is, and the
        whole.

    Raises:
      HeadshareError: the recipe cannot be run, `output` is not a run to be resumed, or too many steps were not finite;
        a checkpoint is then kept.
      TryAgain: another process is at work on this run, or a bucket is not reached; it names the last checkpoint.
      KeyboardInterrupt: it was stopped by Ctrl-C.
    """
    began, stopping = time.perf_counter(), Stop()
    if wandb is not None:
        check_wandb()
    check_profile(profile, range(1, recipe.total_steps + 1))
    with ExitStack() as stack:
        task = _begun(recipe, output, resume, progress, stack)
        folder = output / run_folder.CHECKPOINTS
        checkpoints = RunCheckpoints(folder, recipe.checkpoints.keep)
        set_remedy(lambda: run_folder.remedy(checkpoints.newest))
        stack.enter_context(run_folder.resumable(lambda: checkpoints.newest))
        stack.enter_context(checkpoints)
        stack.enter_context(handled(stopping.note))
        trainer = _Trainer(task, checkpoints, stopping, report, progress, began)
        trainer.start(resume)
        log = stack.enter_context(MetricsLog(output, from_step=trainer.step, wandb=wandb))
        tracing = stack.enter_context(Profile(output / run_folder.PROFILE, profile))
        check_profile(profile, range(trainer.step + 1, recipe.total_steps + 1))
        if trainer.train(log, tracing):
            return trainer.export() | {"goodput": trainer.goodput}
    if stopping.interrupted:
        leave()
        raise KeyboardInterrupt
    return None


def _begun(recipe: recipes.Recipe, output: Path, resume: bool, progress: Progress, stack: ExitStack) -> Run:
    """All that a run is made from, once all processes have the same and see its folder, which is locked."""
    with together("begin") as same:
        same |= beginning(recipe, resume)
        check_devices(recipe)
        run_folder.check(output, recipe, resume)
        if resume:
            stack.enter_context(run_folder.locked(output))
    with together("prepare") as same:
        task = prepare(recipe, output, progress)
        same |= inputs(task)
    if not resume:
        with together("make the folder"):
            run_folder.begin(output, recipe, task.sharing)
    try:
        with together("see the folder"):
            run_folder.check_seen(output)
    except HeadshareError:
        if not resume:
            run_folder.undo(output)
        raise
    if not resume:
        with together("lock the folder"):
            stack.enter_context(run_folder.locked(output))
    return task


class _Trainer:
    """Walks through the stages; holds what changes from step to step."""

    def __init__(
        self,
        task: Run,
        checkpoints: RunCheckpoints,
        stopping: Callable[[int], bool],
        report: Report,
        progress: Progress,
        began: float,
    ):
        self.task, self.checkpoints, self.stopping, self.began = task, checkpoints, stopping, began
        self.report, self.progress, self.current = report, progress, Current(task, progress)
        self.held_out = HeldOut(task.recipe.data, task.eval_tokens)
        self.time_left = TimeLeft([stage.steps for stage in task.recipe.stages])
        self.speed = Speed(task.recipe.compute_dtype, task.recipe.data.seq_len)
        cosine = partial(pair_cosine, sharing=task.sharing)
        self.pair_cosine = jax.jit(cosine, out_shardings=replicated(task.mesh))

    @property
    def step(self) -> int:
        """Steps done in the run."""
        return self.step_in_stage + sum(stage.steps for stage in self.task.recipe.stages[: self.current.number])

    @property
    def goodput(self) -> float:
        """Share of the time since the run began, or went on, that went into steps."""
        return self.time_left.seconds_in_steps / (time.perf_counter() - self.began)

    def start(self, resume: bool) -> None:
        """Takes over the newest checkpoint, or begins the first stage."""
        found = self.checkpoints.restore(self.current.abstract) if resume else None
        beginning = self.current.first_source() if found is None else None
        if self.held_out and not (resume and self.held_out.restore(self.task.output)):
            self._measure_baseline(beginning)
        if beginning is not None:
            self.current.begin(0, beginning)
        elif found is not None:
            self.current.resume(found[1], found[2])
        self._entered()
        self.step_in_stage = int(self.current.state.step)

    def _measure_baseline(self, beginning: WeightSource | None) -> None:
        """Measures the dense model and, where training begins now, the shared one that it begins with."""
        started = time.perf_counter()
        measured = partial(self.held_out.perplexity, progress=partial(self.progress, "measuring the dense model"))
        self.held_out.source_perplexity = measured(self.current.placed(self.task.source))
        self.time_left.pause(time.perf_counter() - started)
        if beginning is not None:
            sharing = self.task.sharing
            shared = beginning if beginning.sharing else SharedView(beginning, sharing, check_source=False)
            progress = partial(self.progress, "measuring the shared model")
            self.held_out.start_perplexity = self.held_out.perplexity(self.current.placed(shared), progress)
        self.held_out.keep(self.task.output)
        self.report(
            {
                "step": 0,
                "stage": self.task.recipe.stages[0].kind,
                "shared_perplexity": self.held_out.start_perplexity,
                "source_perplexity": self.held_out.source_perplexity,
            }
        )

    def train(self, log: MetricsLog, profile: Profile) -> bool:
        """Runs every stage that is left; False if it was told to stop before the end."""
        self.log, self.profile = log, profile
        lines = self.log.lines()
        self.skipped = sum(line.get("skipped", 0) for line in lines)
        self.losses = [line["lm_loss"] or math.nan for line in lines[len(lines) - self.step_in_stage :]]
        for number in range(self.current.number, len(self.task.recipe.stages)):
            if number > self.current.number:
                self.current.begin_next()
                self._entered()
            if not self._train_stage():
                return False
        return True

    def _entered(self) -> None:
        self.step_in_stage, self.losses = 0, []
        self.time_left.enter()

    def export(self) -> dict[str, Any]:
        """Writes the shared model; returns the last step's metrics, and what the run came to."""
        self.log.flush()
        self.log.draw()
        lines = self.log.lines()
        last = (lines[-1] if lines else {}) | {
            "spikes": [line["step"] for line in lines if line.get("spike")],
            "skipped_steps": int(self.skipped),
            # So long did steps wait for checkpoints.
            "held_seconds": sum(line.get("save_seconds", 0.0) for line in lines),
        }
        return export(self.current, self.held_out, last)

    def _train_stage(self) -> bool:
        steps, profile = StageSteps(self.current, self.step_in_stage), self.profile
        # How many steps were bad in a row is known when one has ended.
        self.bad_in_row = math.inf
        while steps.left:
            profile.before(self.step + 1)
            going = steps.begin()
            while going:
                last = self.step + 1
                # Asked while the step runs, so that the next need not wait; or after it, where that waits anyhow.
                pausing = self._pauses_after(last)
                stopping = None if pausing else self.stopping(last)
                going = not pausing and not stopping and steps.begin()
                stopping = self._after_step(steps.end(), stopping)
                profile.after(last)
            if stopping:
                return self.step == self.task.recipe.total_steps
        return True

    def _pauses_after(self, step: int) -> bool:
        """Whether the state after a step, the next one, is wanted, or may be: the step after it has to wait."""
        settings, in_stage = self.task.recipe.checkpoints, self.step_in_stage + step - self.step
        return (
            in_stage == self.current.stage.steps
            or step % settings.every == 0
            or step % settings.eval_every == 0
            or self.profile.pauses_after(step)
            or self._hopeless(self.bad_in_row + 1, self.skipped + 1, step) is not None
        )

    def _after_step(self, values: dict[str, float], stopping: bool | None) -> bool:
        """Logs, evaluates and saves where that is due.

        Args:
          values: of the step.
          stopping: whether the run is to stop after it; None to ask.

        Returns:
          Whether it is.
        """
        recipe = self.task.recipe
        self.step_in_stage += 1
        self.time_left.step(values["seconds"])
        self.skipped, self.bad_in_row = self.skipped + values["skipped"], values["bad_in_row"]
        loss = values["lm_loss"]
        spike = is_spike(self.losses, loss)
        self.losses.append(loss)
        if spike:
            logger.warning("Step %d: the loss rose to %.3f, far above the steps before it.", self.step, loss)
        line: dict[str, Any] = {"step": self.step, "stage": self.current.stage.kind, **values, "spike": float(spike)}
        line |= self.speed.of_step(self.current.context.config, values["tokens"], values["seconds"])
        if self._due(recipe.checkpoints.eval_every):
            started = time.perf_counter()
            line |= self._evaluate()
            self.time_left.pause(time.perf_counter() - started)
        line["goodput"] = self.goodput
        self.report(line | {"seconds_left": self._seconds_left()})
        if stopping is None:
            stopping = self.stopping(self.step)
        hopeless, save = self._hopeless(self.bad_in_row, self.skipped, self.step), None
        if stopping or hopeless or self._due(recipe.checkpoints.every):
            save = self._save(line.get("shared_perplexity"))
            line["save_seconds"] = save.seconds
        self.log.add(line)
        if save is not None:
            # Only now: a checkpoint whose step has no line could not be gone on from.
            self.log.flush()
            save.start()
        if hopeless:
            raise HeadshareError(
                f"The loss or its gradients were NaN or infinite in {hopeless}, until step {self.step}; such steps are "
                "skipped. Lower the learning rate and begin a new run, or allow more (max_bad_steps, max_skipped) and "
                f"resume from the checkpoint of step {self.step}."
            )
        return stopping

    def _hopeless(self, bad_in_row: float, skipped: float, step: int) -> str | None:
        """What of the skipped steps is more than the recipe allows."""
        recipe = self.task.recipe
        if bad_in_row >= recipe.max_bad_steps:
            return f"{recipe.max_bad_steps} steps in a row"
        if skipped >= recipe.max_bad_steps and skipped > recipe.max_skipped * step:
            return f"{skipped:.0f} of {step} steps"
        return None

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step_in_stage == self.current.stage.steps

    def _seconds_left(self) -> list[float] | None:
        """Of this stage and of each after it; None as long as nothing is known."""
        ends = np.cumsum([stage.steps for stage in self.task.recipe.stages]).tolist()
        starts, every = [self.step, *ends[self.current.number : -1]], self.task.recipe.checkpoints.eval_every
        # Where a stage ends there is an evaluation too.
        pauses = [
            (end - 1) // every - start // every + (end > start)
            for start, end in zip(starts, ends[self.current.number :], strict=True)
        ]
        return self.time_left.left(self.current.number, self.step_in_stage, pauses)

    def _evaluate(self) -> dict[str, float | None]:
        """Held-out perplexity of the shared model; in an align stage also of the dense one, and the pairs' cosine."""
        model, sharing = self.current.model(), self.task.sharing
        result: dict[str, float | None] = {}
        aligns = self.current.stage.kind == "align"
        if aligns and len(sharing.receivers):
            pools = {name: model.array(name) for name in map(pool_name, tied_projections(sharing))}
            result["pair_cosine"] = float(self.pair_cosine(pools))
        if self.held_out:
            shared = share(model, sharing, check_source=False) if aligns else model
            result["shared_perplexity"] = self.held_out.perplexity(shared)
            result["source_perplexity"] = self.held_out.source_perplexity
            if aligns:
                result["dense_perplexity"] = self.held_out.perplexity(model)
        return result

    def _save(self, perplexity: float | None) -> Save:
        return self.checkpoints.save(self.step, self.current.arrays(), self.current.document(), perplexity)
