"""The training step: one pure, jitted function from a state and a batch to the next state."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.model.llama import Llama
from headshare_jax.model.mesh import BATCH, batch_sharding
from headshare_jax.parameters import PARAMETERS, parameter_names, pool_name
from headshare_jax.sharing.map import SharingMap
from headshare_jax.train import recipe as recipes
from headshare_jax.train.losses import similarity_penalty, target_mask, tied_projections, token_losses

Params = dict[str, jax.Array]
# A loss, its parts, and its gradients.
Total = tuple[jax.Array, jax.Array, Params]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      params: parameters that train, float32.
      opt_state: of the optimizer; it holds nothing for frozen parameters.
      step: int32 scalar, steps done in this stage, skipped ones included.
      bad_in_row: int32 scalar, steps skipped since the last good one.
    """

    params: Params
    opt_state: Any
    step: jax.Array
    bad_in_row: jax.Array


@dataclass(frozen=True)
class StageContext:
    """What a stage's step is made for: the model's shape and map, and the recipe.

    Attributes:
      config: the architecture.
      sharing: the map; the pairs of the penalty in an `align` stage, the model's own in a `tied` one.
      stage: the stage.
      recipe: the run.
    """

    config: LlamaConfig
    sharing: SharingMap
    stage: recipes.Stage
    recipe: recipes.Recipe

    @property
    def model_sharing(self) -> SharingMap | None:
        """The map that the model being trained is stored by."""
        return self.sharing if self.stage.kind == "tied" else None

    def model(self, params: Mapping[str, Any], mesh: Mesh | None = None) -> Llama:
        """The model being trained, with these parameters; given a mesh, its activations are cut along the batch."""
        return Llama(
            self.config,
            params,
            sharing=self.model_sharing,
            compute_dtype=self.recipe.compute_dtype,
            remat=self.recipe.remat,
            batch_sharding=None if mesh is None else batch_sharding(mesh),
        )

    def teacher(self, params: Mapping[str, Any], mesh: Mesh | None = None) -> Llama | None:
        """The dense model to distil from, if the stage distils."""
        dense = replace(self, stage=recipes.Stage(kind="align"))
        return dense.model(params, mesh) if self.stage.distill_weight else None

    def learning_rate(self) -> optax.Schedule:
        """The stage's learning rate by step."""
        settings, steps, peak = self.recipe.optimizer, self.stage.steps, self.stage.learning_rate
        warmup = min(settings.warmup, steps)
        rest = max(steps - warmup, 1)
        if settings.schedule == "cosine":
            after = optax.cosine_decay_schedule(peak, rest, settings.end_rate)
        elif settings.schedule == "wsd":
            decay = max(rest // 5, 1)
            after = optax.linear_schedule(peak, peak * settings.end_rate, decay, rest - decay)
        else:
            after = optax.constant_schedule(peak)
        return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])

    def sim_weight(self, step: jax.Array) -> jax.Array:
        """Weight of the similarity penalty at a step, float32 scalar."""
        weight = jnp.float32(self.stage.sim_weight)
        part = (step.astype(jnp.float32) + 1) / self.stage.steps
        if self.stage.sim_schedule == "linear":
            return weight * part
        if self.stage.sim_schedule == "cosine":
            return weight * (1 - jnp.cos(jnp.pi * part)) / 2
        return weight

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW after a clip by global norm; matrices decay, norms and biases do not.

        Its updates are still to be multiplied by the learning rate, which follows the steps of the stage: the
        optimizer's own count leaves out skipped steps.
        """
        settings = self.recipe.optimizer
        return optax.chain(
            optax.clip_by_global_norm(settings.clip),
            optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps),
            optax.add_decayed_weights(
                settings.weight_decay, lambda params: {name: PARAMETERS[name].decays for name in params}
            ),
        )


def trainable_names(config: LlamaConfig, trainable: str) -> tuple[str, ...]:
    """Parameters that train: `all`, `attention` (the four projections), or those that match a pattern.

    Raises:
      HeadshareError: a pattern that matches nothing.
    """
    names = parameter_names(config)
    trainable = {"all": "*", "attention": "[qkvo]_*"}.get(trainable, trainable)
    patterns = [part.strip() for part in trainable.split(",")]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise HeadshareError(f"trainable {pattern!r} matches no parameter; these are: {', '.join(names)}.")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def first_state(context: StageContext, params: Params) -> TrainState:
    """The state before a stage's first step."""
    return TrainState(params, context.optimizer().init(params), jnp.int32(0), jnp.int32(0))


def make_step(context: StageContext, *, state_sharding: Any = None) -> jax.stages.Wrapped:
    """The jitted step `(state, frozen, teacher, tokens, segments) -> (state, metrics)`.

    `frozen` holds the parameters that do not train, `teacher` the dense model's (empty without distillation);
    `tokens` and `segments` are int32 [A, B, T]: accumulated parts, sequences, positions; segment 0 is padding,
    from which nothing is learnt. The state is donated. A step whose loss or gradients are not finite changes nothing
    but the counters.

    Metrics, float32 scalars: `loss`, `lm_loss` (nats per token), `sim_loss`, `distill_loss`, `gradient_norm`,
    `learning_rate`, `sim_weight`, `tokens` (predicted), `skipped` (1 for a skipped step), `bad_in_row` (steps skipped
    since the last good one).
    """
    optimizer, rate = context.optimizer(), context.learning_rate()
    out = None if state_sharding is None else (state_sharding, None)
    mesh = None if state_sharding is None else jax.tree.leaves(state_sharding)[0].mesh

    @partial(jax.jit, donate_argnums=0, out_shardings=out)
    def step(
        state: TrainState, frozen: Params, teacher: Params, tokens_abt: jax.Array, segments_abt: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, metrics), gradients = loss_and_gradients(
            context, state.params, frozen, teacher, tokens_abt, segments_abt, state.step, mesh
        )
        norm = optax.tree.norm(gradients)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        # optax raises floats to the power of its integer counts.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            learning_rate = jnp.asarray(rate(state.step), jnp.float32)
        changed = (jax.tree.map(lambda param, update: param - learning_rate * update, state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), changed, (state.params, state.opt_state)
        )
        metrics |= {"gradient_norm": norm, "learning_rate": learning_rate, "skipped": 1 - good.astype(jnp.float32)}
        bad_in_row = jnp.where(good, 0, state.bad_in_row + 1)
        metrics["bad_in_row"] = bad_in_row.astype(jnp.float32)
        return TrainState(params, opt_state, state.step + 1, bad_in_row), metrics

    return step


def loss_and_gradients(
    context: StageContext,
    params: Params,
    frozen: Params,
    teacher: Params,
    tokens_abt: jax.Array,
    segments_abt: jax.Array,
    step: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Params]:
    """The objective with its parts, and its gradients; the accumulated parts count by their predicted tokens."""
    stage = context.stage
    predicted = jnp.sum(jax.vmap(target_mask)(segments_abt), dtype=jnp.float32)
    count = jnp.maximum(predicted, 1.0)

    def part_loss(params: Params, tokens_bt: jax.Array, segments_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        return token_losses(
            context.model({**frozen, **params}, mesh),
            tokens_bt,
            segments_bt,
            lm_weight=(stage.lm_weight if stage.kind == "align" else 1.0) / count,
            z_weight=stage.z_weight,
            teacher=context.teacher(teacher, mesh),
            distill_weight=stage.distill_weight / count,
            temperature=stage.temperature,
            parts=1 if mesh is None else prod(mesh.shape[axis] for axis in BATCH),
        )

    gradient = jax.value_and_grad(part_loss, has_aux=True)

    def accumulate(total: Total, part: tuple[jax.Array, jax.Array]) -> tuple[Total, None]:
        (loss, parts), gradients = gradient(params, *part)
        return jax.tree.map(jnp.add, total, (loss, parts, gradients)), None

    if tokens_abt.shape[0] == 1:
        (loss, parts), gradients = gradient(params, tokens_abt[0], segments_abt[0])
    else:
        nothing = (jnp.float32(0), jnp.zeros(2), jax.tree.map(jnp.zeros_like, params))
        (loss, parts, gradients), _ = jax.lax.scan(accumulate, nothing, (tokens_abt, segments_abt))
    lm_loss, distill_loss = parts / count
    sim = weight = jnp.float32(0)
    if stage.kind == "align":
        weight = context.sim_weight(step)
        # Differentiated for these alone: zeros for all other parameters would cost as much as a pass over them.
        pools = {name: params[name] for name in map(pool_name, tied_projections(context.sharing)) if name in params}
        sim, sim_gradients = jax.value_and_grad(
            lambda pools: similarity_penalty({**frozen, **params, **pools}, context.sharing, stage.penalty)
        )(pools)
        loss = loss + weight * sim
        gradients |= {name: gradients[name] + weight * more for name, more in sim_gradients.items()}
    metrics = {"loss": loss, "lm_loss": lm_loss, "distill_loss": distill_loss, "sim_loss": sim, "sim_weight": weight}
    return (loss, metrics | {"tokens": predicted}), gradients
