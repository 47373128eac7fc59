"""The stage that a run is in: its state on the mesh, how it begins, and what becomes of it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import jax

from headshare_jax import convert
from headshare_jax.convert.atomic import own_file
from headshare_jax.errors import HeadshareError
from headshare_jax.fit.refit import RefitReport, refit
from headshare_jax.model.llama import Llama
from headshare_jax.model.place import place
from headshare_jax.parameters import parameter_names
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import SharedView
from headshare_jax.train import recipe as recipes
from headshare_jax.train import run_folder
from headshare_jax.train.inputs import Progress, Run, slim_model
from headshare_jax.train.placement import abstract_params, abstract_state, begin
from headshare_jax.train.step import Params, StageContext, TrainState


class Current:
    """The current stage of a run.

    Attributes:
      number: of the stage in the recipe.
      context: what its step is made for.
      state: all that steps change.
      frozen: the parameters that do not train.
      teacher: the dense model's parameters; none without distillation.
    """

    number: int
    context: StageContext
    state: TrainState
    frozen: Params
    teacher: Params

    def __init__(self, task: Run, progress: Progress):
        self.task, self.progress, self.teacher = task, progress, {}

    @property
    def stage(self) -> recipes.Stage:
        """Its settings."""
        return self.context.stage

    def first_source(self) -> WeightSource:
        """What the first stage begins with."""
        recipe = self.task.recipe
        if recipe.sharing.start is not None:
            return convert.open_checkpoint(recipe.sharing.start)
        if recipe.sharing.method is not None:
            return self._slimmed()
        return self.task.source if recipe.stages[0].kind == "align" else self._shared(self.task.source)

    def _slimmed(self) -> WeightSource:
        """The slim model of the run's map; made anew for a run that was stopped before its first checkpoint."""
        task = self.task
        made = task.slimmed
        if made is None:
            text = task.blocks.first(task.recipe.sharing.refit_windows)
            made = slim_model(task.recipe, task.source, text, task.mesh, self.progress)
        if made.map != task.sharing:
            raise HeadshareError(
                f"Made again, the slim model has another map than the run's {run_folder.MAP}; begin a new run."
            )
        assert made.fit is not None
        self._keep_fit(made.fit)
        return made.model

    def begin(self, number: int, source: WeightSource, *, take: bool = False) -> None:
        """Makes a stage the current one, before its first step, with a source's weights; `take` is as of `begin`."""
        self._enter(number)
        self.state, self.frozen = begin(self.context, source, self.task.mesh, take=take)
        self._place_teacher()

    def begin_next(self) -> None:
        """Goes on to the next stage with what this one came to."""
        number = self.number + 1
        source = self.finished(self.task.recipe.stages[number].kind)
        # The optimizer's moments make room for those of the next stage.
        del self.state, self.frozen
        self.begin(number, source, take=True)

    def resume(self, arrays: Mapping[str, Any], document: Mapping[str, Any]) -> None:
        """Takes over a checkpoint's arrays and document."""
        self._enter(document["stage"])
        self.state, self.frozen = TrainState(**arrays["state"]), arrays["frozen"]
        self._place_teacher()

    def _enter(self, number: int) -> None:
        self.number, self.context = number, self.task.context(number)

    def _place_teacher(self) -> None:
        taught = parameter_names(self.context.config) if self.stage.distill_weight else ()
        # That of the stage before is the same.
        if set(self.teacher) != set(taught):
            self.teacher = {}
            self.teacher = place(self.task.source, taught, self.task.mesh)

    @property
    def final_dtype(self) -> str:
        """The type that the run's model is written in."""
        source = self.task.source
        chosen = self.task.recipe.final.dtype or convert.output_dtype(source, "native")
        return chosen or str(source.dtype("embed_vd"))

    def model(self) -> Llama:
        """The stage's model as trained so far."""
        return self.context.model({**self.frozen, **self.state.params}, self.task.mesh)

    def forget_optimizer(self) -> None:
        """Gives the optimizer's memory back, when no more steps come."""
        for leaf in jax.tree.leaves(self.state.opt_state):
            leaf.delete()

    def placed(self, source: WeightSource) -> Llama:
        """A source on the run's mesh."""
        return Llama.of(source, mesh=self.task.mesh, compute_dtype=self.task.recipe.compute_dtype)

    def finished(self, kind: str) -> WeightSource:
        """What a stage of a kind goes on from: the stage's model, shared for good where it is `tied`."""
        model = self.model()
        return model if kind == "align" or model.sharing is not None else self._shared(model)

    def _shared(self, dense: WeightSource) -> WeightSource:
        """A model shared for good, its output weights fitted to the dense one if the recipe says so."""
        # Whether the map is for these weights was looked at when the run began.
        shared = SharedView(dense, self.task.sharing, check_source=False)
        windows = self.task.recipe.sharing.refit_windows
        if not windows:
            return shared
        text, mesh = self.task.blocks.first(windows), self.task.mesh
        fitted, report = refit(dense, shared, text, mesh=mesh, progress=partial(self.progress, "refitting"))
        self._keep_fit(report)
        return fitted

    def _keep_fit(self, report: RefitReport) -> None:
        if jax.process_index() == 0:
            with own_file(self.task.output / run_folder.REFIT) as path:
                path.write_text(json.dumps(asdict(report), indent=1))

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"state": vars(self.state), "frozen": self.frozen}

    def document(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {
            "stage": self.number,
            "kind": self.stage.kind,
            "config": self.context.config.to_json(),
            "model": self.task.recipe.model,
            "dtype": self.final_dtype,
            "recipe": recipes.to_yaml(self.task.recipe),
            "map": self.task.sharing.to_json(),
            "data": self.task.blocks.digest,
            # What an earlier stage trained is float32, whatever the model is stored in.
            "frozen": {name: str(value.dtype) for name, value in self.frozen.items()},
        }

    def abstract(self, document: Mapping[str, Any]) -> Any:
        """The arrays of a checkpoint of this run, as shapes on this run's mesh.

        Raises:
          HeadshareError: the checkpoint is of another run.
        """
        if document["data"] != self.task.blocks.digest:
            raise HeadshareError("The checkpoint was trained on other data: the text or the tokenizer has changed.")
        if SharingMap.from_json(document["map"]) != self.task.sharing:
            raise HeadshareError(f"The checkpoint was trained with another map than the run's {run_folder.MAP}.")
        context, mesh = self.task.context(document["stage"]), self.task.mesh
        frozen = abstract_params(context.config, context.model_sharing, mesh, document["frozen"])
        return {"state": vars(abstract_state(context, mesh)), "frozen": frozen}
