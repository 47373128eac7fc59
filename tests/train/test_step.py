"""The training step against PyTorch, and what it promises about state, schedules and types."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support_torch
import torch
import transformers
from support import ALL_VARIANTS, compilations, random_tokens, sharing_by_hand, tiny_hf_model, tiny_model

from headshare_jax import HeadshareError, Llama, SharingMap, ledger, parameters, share
from headshare_jax.train import recipe as recipes
from headshare_jax.train.step import (
    Params,
    StageContext,
    TrainState,
    first_state,
    loss_and_gradients,
    make_step,
    trainable_names,
)

RATE, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.1
# Two packed rows, one of them ending in padding.
SEGMENTS = np.stack([np.repeat([1, 2], [9, 15]), np.repeat([1, 2, 0], [3, 14, 7])]).astype(np.int32)
METRICS = {"loss", "lm_loss", "sim_loss", "distill_loss", "gradient_norm", "learning_rate", "sim_weight", "tokens"}
METRICS |= {"skipped", "bad_in_row"}


def pairs(model: Llama, tie: str) -> SharingMap:
    """Three pairs, two of them with the same donor."""
    units = model.config.num_kv_heads
    return sharing_by_hand(model, tie, {units: 0, 2 * units - 1: 1, 2 * units: 0})


def context(
    model: Llama, tie: str = "qkv", *, optimizer: Any = None, settings: Any = None, **stage: Any
) -> StageContext:
    """A stage of four steps in float32, of which the first warms up."""
    document: dict[str, Any] = {
        "model": "tiny",
        "data": {"train": "text"},
        "compute_dtype": "float32",
        "remat": "none",
        "optimizer": {"warmup": 1, "clip": CLIP, **(optimizer or {})},
        "stages": [{"steps": 4, "learning_rate": RATE, **stage}],
    }
    recipe = recipes.from_mapping(document | (settings or {}))
    return StageContext(model.config, pairs(model, tie), recipe.stages[0], recipe)


def split_params(at: StageContext, dense: Llama) -> tuple[Params, Params]:
    """The parameters that train and those that do not; copies, since a step takes its state's buffers."""
    model = dense if at.model_sharing is None else share(dense, at.model_sharing)
    every = {name: jnp.array(getattr(model, name)[...]) for name in parameters.parameter_names(model.config)}
    names = trainable_names(model.config, at.stage.trainable)
    return {name: every.pop(name) for name in names}, every


def batch(seed: int, parts: int = 1) -> tuple[jax.Array, jax.Array]:
    """Tokens and segments, int32 [parts, 2 / parts, T]."""
    shape = (parts, 2 // parts, SEGMENTS.shape[1])
    return jnp.asarray(random_tokens(SEGMENTS.shape, seed=seed).reshape(shape)), jnp.asarray(SEGMENTS.reshape(shape))


def evaluate(at: StageContext, model: Llama, parts: int = 1, teacher: Params | None = None) -> Any:
    """`loss_and_gradients` of the first batch, compiled."""
    params, frozen = split_params(at, model)

    @jax.jit
    def compiled(params: Params, frozen: Params) -> Any:
        return loss_and_gradients(at, params, frozen, teacher or {}, *batch(0, parts), jnp.int32(1))

    return compiled(params, frozen)


def assert_close(actual: Any, expected: Any, name: str, rtol: float = 1e-4) -> None:
    """Equal but for rounding, which grows with the largest of the terms, not with their sum."""
    expected = np.asarray(expected)
    atol = rtol / 10 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=atol, err_msg=name)


class TorchTraining:
    """The same training in PyTorch, on leaves that are shaped as the step's parameters."""

    def __init__(self, at: StageContext, model: Llama, hf: Any, teacher: Llama | None = None):
        self.at, self.hf = at, hf
        self.leaves = support_torch.leaves(model if at.model_sharing is None else share(model, at.model_sharing))
        self.teacher = support_torch.leaves(teacher or model)
        matrices = [leaf for name, leaf in self.leaves.items() if parameters.PARAMETERS[name].decays]
        vectors = [leaf for name, leaf in self.leaves.items() if not parameters.PARAMETERS[name].decays]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS)
        self.schedule = transformers.get_cosine_schedule_with_warmup(self.optimizer, 1, at.stage.steps)

    def backward(self, tokens: np.ndarray) -> dict[str, float]:
        """Leaves gradients in the leaves; returns the loss and its parts."""
        stage, config = self.at.stage, self.at.config
        logits, targets = support_torch.predictions(
            self.hf, config, self.at.model_sharing, self.leaves, tokens, SEGMENTS
        )
        lm_loss = support_torch.next_token_loss(logits, targets, stage.z_weight) / len(targets)
        loss = lm_loss * (stage.lm_weight if stage.kind == "align" else 1.0)
        parts = {"lm_loss": lm_loss, "sim_loss": torch.zeros(()), "distill_loss": torch.zeros(())}
        if stage.kind == "align":
            weights = support_torch.hf_weights(config, None, self.leaves)
            parts["sim_loss"] = support_torch.penalty(weights, config, self.at.sharing, stage.penalty)
            loss = loss + stage.sim_weight * parts["sim_loss"]
        if stage.distill_weight:
            expected, _ = support_torch.predictions(self.hf, config, None, self.teacher, tokens, SEGMENTS)
            parts["distill_loss"] = support_torch.forward_kl(expected, logits, stage.temperature) / len(targets)
            loss = loss + stage.distill_weight * parts["distill_loss"]
        self.optimizer.zero_grad()
        loss.backward()
        return {name: value.item() for name, value in {**parts, "loss": loss}.items()}

    def step(self, tokens: np.ndarray) -> dict[str, float]:
        """Changes the leaves; returns what the step's metrics should be."""
        metrics = self.backward(tokens)
        norm = torch.nn.utils.clip_grad_norm_(self.leaves.values(), CLIP)
        metrics |= {"gradient_norm": norm.item(), "learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.optimizer.step()
        self.schedule.step()
        return metrics


TRAININGS: list[Any] = [
    ("gqa", "qkv", {"penalty": "js", "sim_weight": 5.0, "distill_weight": 0.5, "temperature": 2.0}),
    ("tied", "qkvo", {"penalty": "kl", "sim_weight": 5.0, "z_weight": 1e-3}),
    ("qwen3, biases", "mixed", {"penalty": "norm"}),
    ("mha", "mixed", {"kind": "tied"}),
    ("qwen2, windows", "qk", {"kind": "tied"}),
    ("smollm3", "qkvo", {"kind": "tied", "z_weight": 1e-3, "distill_weight": 2.0}),
]


@pytest.mark.parametrize(("variant", "tie", "stage"), TRAININGS)
def test_training_is_that_of_torch(variant: str, tie: str, stage: dict[str, Any]) -> None:
    overrides = ALL_VARIANTS[variant]
    model, teacher = tiny_model(**overrides), tiny_model(seed=1, **overrides)
    at = context(model, tie, **stage)
    reference = TorchTraining(at, model, tiny_hf_model(**overrides), teacher)
    dense = {name: getattr(teacher, name)[...] for name in parameters.parameter_names(model.config)}

    _, gradients = evaluate(at, model, teacher=dense)
    reference.backward(random_tokens(SEGMENTS.shape))
    for name, leaf in reference.leaves.items():
        assert leaf.grad is not None
        assert_close(gradients[name], leaf.grad, name)

    state, step = first_state(at, split_params(at, model)[0]), make_step(at)
    for number in range(at.stage.steps):
        expected = reference.step(random_tokens(SEGMENTS.shape, seed=number))
        state, metrics = step(state, {}, dense if at.stage.distill_weight else {}, *batch(number))
        for name, value in expected.items():
            assert float(metrics[name]) == pytest.approx(value, rel=1e-4), name
        assert expected["gradient_norm"] > CLIP
    for name, leaf in reference.leaves.items():
        # Adam moves every weight by up to the rate whatever its gradient; where that is nothing but rounding, so is
        # the move.
        value = leaf.detach().numpy()
        np.testing.assert_allclose(np.asarray(state.params[name]), value, rtol=1e-4, atol=RATE / 100, err_msg=name)


@pytest.mark.parametrize("kind", ["align", "tied"])
def test_accumulated_parts_are_as_one_batch(kind: str) -> None:
    model = tiny_model()
    at = context(model, kind=kind, z_weight=1e-3)
    (loss, metrics), gradients = evaluate(at, model)
    (their_loss, their_metrics), their_gradients = evaluate(at, model, parts=2)
    assert float(loss) == pytest.approx(float(their_loss), rel=1e-6)
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(
        {name: float(x) for name, x in their_metrics.items()}, rel=1e-6
    )
    for name, gradient in gradients.items():
        assert_close(their_gradients[name], gradient, name, rtol=1e-5)


def test_remat_changes_no_gradient() -> None:
    model = tiny_model()
    _, gradients = evaluate(context(model), model)
    for remat in ("dots", "full"):
        _, theirs = evaluate(context(model, settings={"remat": remat}), model)
        for name, gradient in gradients.items():
            assert_close(theirs[name], gradient, name, rtol=1e-5)


def run(at: StageContext, model: Llama, steps: int = 2) -> tuple[TrainState, Params, dict[str, jax.Array]]:
    """State, frozen parameters and metrics after some steps."""
    params, frozen = split_params(at, model)
    state, step = first_state(at, params), make_step(at)
    for number in range(steps):
        state, metrics = step(state, frozen, {}, *batch(number))
    return state, frozen, metrics


def test_bfloat16_computes_but_does_not_store() -> None:
    model = tiny_model()
    exact, _, _ = run(context(model), model)
    at = context(model, settings={"compute_dtype": "bfloat16"})
    state, _, _ = run(at, model)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    start, _ = split_params(at, model)
    for name in start:
        moved, should = (np.asarray(params[name] - start[name]) for params in (state.params, exact.params))
        # Most moves are smaller than the distance of two bfloat16 numbers: stored in those they would be lost.
        assert np.vdot(moved, should) > 0.98 * np.linalg.norm(moved) * np.linalg.norm(should), name


def moment_sizes(state: TrainState) -> int:
    """Elements of the optimizer's moments."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)


def test_dropped_units_never_come_back() -> None:
    dense = tiny_model()
    at = context(dense, "mixed", kind="tied")
    state, frozen, _ = run(at, dense)
    trained = at.model({**frozen, **state.params})
    before = share(dense, at.sharing)
    for layer, dropped in enumerate(np.repeat(at.sharing.dropped, at.config.heads_per_unit, axis=1)):
        heads_nhd = trained.read("o_pool_phd", layer)
        np.testing.assert_array_equal(np.all(heads_nhd == 0, axis=(1, 2)), dropped)
        np.testing.assert_array_equal(np.all(heads_nhd == before.read("o_pool_phd", layer), axis=(1, 2)), dropped)


def test_optimizer_of_a_tied_run_is_smaller_by_what_sharing_saves() -> None:
    model = tiny_model()
    dense, tied = (context(model, "qkvo", kind=kind) for kind in ("align", "tied"))
    sizes = [moment_sizes(first_state(at, split_params(at, model)[0])) for at in (dense, tied)]
    saving = ledger(share(model, tied.sharing)).nominal_saving
    assert saving == 3 * 64 * 16 * (2 + 1 + 1 + 2)
    assert sizes[0] - sizes[1] == 2 * saving


@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        ("attention", {"q_pool_pdh", "k_pool_pdh", "v_pool_pdh", "o_pool_phd"}),
        ("*_norm_*, head_*", {"attn_norm_ld", "mlp_norm_ld", "final_norm_d", "head_vd"}),
        ("[kv]_pool_*", {"k_pool_pdh", "v_pool_pdh"}),
    ],
)
def test_frozen_parameters_have_no_optimizer_state_and_do_not_change(trainable: str, trained: set[str]) -> None:
    model = tiny_model()
    at = context(model, trainable=trainable)
    start, _ = split_params(at, model)
    state, frozen, metrics = run(at, model)
    assert set(state.params) == trained
    assert moment_sizes(state) == 2 * sum(param.size for param in state.params.values())
    assert float(metrics["gradient_norm"]) > 0
    for name in trained:
        assert not np.array_equal(state.params[name], start[name]), name
    for name, param in frozen.items():
        np.testing.assert_array_equal(param, getattr(model, name)[...])


def test_training_a_part_gives_its_gradients_of_training_all() -> None:
    model = tiny_model()
    _, gradients = evaluate(context(model), model)
    _, part = evaluate(context(model, trainable="attention"), model)
    for name, gradient in part.items():
        assert_close(gradient, gradients[name], name, rtol=1e-5)


def test_bias_of_attention_trains_with_it_and_does_not_decay() -> None:
    model = tiny_model(attention_bias=True)
    at = context(model, trainable="attention", lm_weight=0.0, sim_weight=0.0)
    start, _ = split_params(at, model)
    assert {"q_bias_ph", "o_bias_ld"} <= set(start)
    state, _, _ = run(at, model)
    for name, param in state.params.items():
        # Without a loss nothing moves but by decay, and the first of the two steps has rate 0.
        kept = 1.0 if "bias" in name else 1 - RATE * DECAY
        np.testing.assert_allclose(param, kept * np.asarray(start[name]), rtol=1e-6, err_msg=name)


def test_pattern_without_a_parameter_is_refused() -> None:
    with pytest.raises(HeadshareError, match="'gate_q' matches no parameter; these are: embed_vd"):
        trainable_names(tiny_model().config, "q_*, gate_q")


def copied(tree: Any) -> list[np.ndarray]:
    """Leaves of a tree on the host, that stay when a step takes their buffers."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def test_step_without_finite_loss_changes_nothing_but_the_counters() -> None:
    model = tiny_model()
    at = context(model, settings={"max_bad_steps": 3})
    params, _ = split_params(at, model)
    tokens, segments = batch(0)
    poison = int(tokens[0, 0, 0])
    params["embed_vd"] = params["embed_vd"].at[poison].set(jnp.inf)
    harmless = jnp.where(tokens == poison, poison + 1, tokens)
    step = make_step(at)
    state, metrics = step(first_state(at, params), {}, {}, harmless, segments)
    assert (float(metrics["skipped"]), float(metrics["bad_in_row"])) == (0, 0)
    before = copied((state.params, state.opt_state))
    for number in (1, 2):
        state, metrics = step(state, {}, {}, tokens, segments)
        assert not np.isfinite(float(metrics["loss"]))
        assert (float(metrics["skipped"]), float(metrics["bad_in_row"]), int(state.bad_in_row)) == (1, number, number)
        assert int(state.step) == 1 + number
        for old, new in zip(before, copied((state.params, state.opt_state)), strict=True):
            np.testing.assert_array_equal(new, old)
    state, metrics = step(state, {}, {}, harmless, segments)
    assert (float(metrics["skipped"]), int(state.bad_in_row), int(state.step)) == (0, 0, 4)
    assert np.isfinite(float(metrics["loss"]))
    # Skipped steps count in the schedule, which ends with the stage.
    assert float(metrics["learning_rate"]) == pytest.approx(float(at.learning_rate()(3)))
    assert not np.array_equal(before[0], copied(state.params)[0])


def test_batch_without_a_prediction_is_harmless() -> None:
    model = tiny_model()
    at = context(model, kind="tied")
    tokens, segments = batch(0)
    state, metrics = make_step(at)(first_state(at, split_params(at, model)[0]), {}, {}, tokens, 0 * segments)
    assert (float(metrics["tokens"]), float(metrics["loss"]), float(metrics["skipped"])) == (0, 0, 0)
    assert all(np.isfinite(leaf).all() for leaf in copied(state))


def test_state_is_donated_and_one_program_serves_all_steps() -> None:
    model = tiny_model()
    at = context(model)
    step, state = make_step(at), first_state(at, split_params(at, model)[0])
    for number in range(3):
        old = jax.tree.leaves((state.params, state.opt_state))
        state, _ = step(state, {}, {}, *batch(number))
        assert all(leaf.is_deleted() for leaf in old)
    assert compilations(step) == 1


@pytest.mark.parametrize("kind", ["align", "tied"])
def test_metrics_are_float32_scalars(kind: str) -> None:
    model = tiny_model()
    _, _, metrics = run(context(model, kind=kind), model)
    assert set(metrics) == METRICS
    assert {(value.shape, value.dtype) for value in metrics.values()} == {((), jnp.dtype("float32"))}
    assert float(metrics["tokens"]) == 37


def rates(steps: int, optimizer: dict[str, Any]) -> list[float]:
    """Learning rate at every step, the peak being 1."""
    rate = context(tiny_model(), steps=steps, learning_rate=1.0, optimizer=optimizer).learning_rate()
    return [float(rate(step)) for step in range(steps)]


def test_cosine_schedule_is_that_of_transformers() -> None:
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 4, 20)
    expected = []
    for _ in range(20):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates(20, {"warmup": 4}) == pytest.approx(expected, abs=1e-6)


def test_schedules_warm_up_hold_and_decay() -> None:
    warm = [0, 0.25, 0.5, 0.75]
    assert rates(8, {"schedule": "constant", "warmup": 4}) == pytest.approx([*warm, 1, 1, 1, 1])
    assert rates(24, {"schedule": "wsd", "warmup": 4, "end_rate": 0.2}) == pytest.approx(
        [*warm, *[1] * 17, 0.8, 0.6, 0.4]
    )
    cosine = rates(101, {"schedule": "cosine", "warmup": 0, "end_rate": 0.1})
    assert (cosine[0], cosine[100]) == pytest.approx((1, 0.1 + 0.9 * (1 + np.cos(np.pi * 100 / 101)) / 2))
    # All of a stage that is shorter than its warm-up warms up.
    assert rates(2, {"warmup": 4}) == pytest.approx([0, 0.5])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.4] * 4), ("linear", [0.1, 0.2, 0.3, 0.4]), ("cosine", [0.0586, 0.2, 0.3414, 0.4])],
)
def test_weight_of_the_penalty_is_full_at_the_last_step(schedule: str, expected: list[float]) -> None:
    at = context(tiny_model(), sim_weight=0.4, sim_schedule=schedule)
    weights = [at.sim_weight(jnp.int32(step)) for step in range(4)]
    assert {weight.dtype for weight in weights} == {jnp.dtype("float32")}
    assert [float(weight) for weight in weights] == pytest.approx(expected, abs=1e-4)
