"""Recipes: everything that defines a PostShare run, read from YAML and checked by pydantic."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from headshare_jax.convert import storage
from headshare_jax.convert.outputs import check_output
from headshare_jax.errors import HeadshareError, explained, shown
from headshare_jax.train.sections import (
    Count,
    Fraction,
    Natural,
    Number,
    Positive,
    Section,
    Sharing,
    Weight,
    Whole,
)

# Recipes that come with the package, by name.
SHIPPED = {path.stem: path for path in sorted(Path(__file__).with_name("recipes").glob("*.yaml"))}
# Tokens of a step, which are counted in int32.
MOST_TOKENS = 2**31 - 1
# Settings of the penalty, which `tied` stages do not have; the next-token loss has weight 1 there.
_ALIGN_ONLY = ("lm_weight", "sim_weight", "sim_schedule", "penalty")


class Source(Section):
    """A text to train on.

    Attributes:
      source: text, JSONL or parquet file, or data set `name[:config[:split]]` (split `train` by default).
      weight: how often a block comes from it, against the weights of the other texts.
      text_field: field or column that holds its text; None for that of `data`.
    """

    source: str
    weight: Positive = 1.0
    text_field: str | None = None


def _as_sources(value: Any) -> Any:
    return [{"source": value}] if isinstance(value, str) else value


def _as_written(sources: tuple[Source, ...]) -> Any:
    """A single text by its name alone, as recipes have it."""
    if sources == (Source(source=sources[0].source),):
        return sources[0].source
    return [source.model_dump(mode="json") for source in sources]


class Data(Section):
    """Text to train and to evaluate on.

    Attributes:
      train: a text by its name, or a list of several (`Source`), from which batches are mixed.
      eval: held-out text of the same kinds; None for no evaluation.
      text_field: field or column that holds the text.
      streaming: data sets to train on are read from their hub as they come, and no copy is kept.
      seq_len: tokens in a training block.
      workers: threads that tokenise; None for one a core.
      eval_windows: windows of `seq_len` tokens to evaluate on.
    """

    train: Annotated[
        tuple[Source, ...], Field(min_length=1), BeforeValidator(_as_sources), PlainSerializer(_as_written)
    ]
    eval: str | None = None
    text_field: str = "text"
    streaming: bool = False
    seq_len: Annotated[Whole, Field(ge=2)] = 4096
    workers: Count | None = None
    eval_windows: Count = 16


class Optimizer(Section):
    """AdamW and its learning rate; the defaults are the paper's (section 4.1).

    Attributes:
      schedule: `cosine` to `end_rate` times the peak; `wsd`, constant and then linear over the last fifth; `constant`.
      warmup: steps of linear warm-up.
      weight_decay: of matrices; norms and biases have none.
      clip: most that the global norm of the gradients may be.
    """

    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Natural = 0
    end_rate: Annotated[Number, Field(ge=0, le=1)] = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Positive = 1e-8
    weight_decay: Weight = 0.1
    clip: Positive = 1.0


class Stage(Section):
    """One stage of training.

    Attributes:
      kind: `align` trains the dense model with the similarity penalty, then shares it; `tied` trains the shared model.
      steps: optimizer steps.
      learning_rate: its peak.
      lm_weight: weight of the next-token loss (`align` only; 1 in `tied`).
      sim_weight: weight of the penalty (`align` only; 0 in `tied`).
      sim_schedule: `constant`, or a `linear` or `cosine` ramp of `sim_weight` from 0 to its full value (`align` only).
      penalty: form of the similarity penalty (`align` only).
      z_weight: weight of the squared log-partition.
      distill_weight: weight of the divergence from the dense model.
      temperature: of the distillation.
      trainable: `all`, `attention`, or a comma-separated list of patterns of parameter names (`*_pool_*`).
    """

    kind: Literal["align", "tied"] = "align"
    steps: Count = 1000
    learning_rate: Positive = 5e-5
    lm_weight: Weight = 0.5
    sim_weight: Weight = 0.5
    sim_schedule: Literal["constant", "linear", "cosine"] = "constant"
    penalty: Literal["norm", "mse", "kl", "js"] = "norm"
    z_weight: Weight = 0.0
    distill_weight: Weight = 0.0
    temperature: Positive = 1.0
    trainable: str = "all"


class Mesh(Section):
    """Sizes of the device mesh, of which one may be -1, for all devices that the others leave.

    Attributes:
      dcn_data: slices of chips, or groups of hosts, joined by a slower network than the chips in each: every one holds
        the whole model, and only sums of gradients cross.
      data, fsdp, tensor: sizes within a slice.
    """

    dcn_data: Count = 1
    data: Whole = 1
    fsdp: Whole = -1
    tensor: Whole = 1


class Checkpoints(Section):
    """When to save and evaluate, in steps, and how many of the last checkpoints to keep besides the best."""

    every: Count = 200
    keep: Count = 2
    eval_every: Count = 200


class Final(Section):
    """How the model is written that a run ends with.

    Attributes:
      to: `native`, `hf`, `hf-compact` or `gguf`, as of `headshare convert`.
      dtype: type of its parameters; by default that of the dense model.
      quantize: for `gguf`, the type of matrices.
    """

    to: Literal["native", "hf", "hf-compact", "gguf"] = "native"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: str | None = None


class Recipe(Section):
    """A PostShare run.

    Attributes:
      model: native or Hugging Face folder, .gguf file, or hub id.
      batch_size: sequences in a step, over all devices and accumulation steps.
      accumulate: parts that a step's batch is cut into, run one after another.
      compute_dtype: `float32` or `bfloat16`; master weights and optimizer state are float32.
      remat: `none`, `dots` or `full`.
      max_bad_steps: steps in a row whose loss or gradients may be NaN or infinite (they are skipped) before it stops.
      max_skipped: part of the steps so far that may be skipped before it stops, once they are `max_bad_steps`.
      seed: of the order of the blocks.
    """

    model: str
    data: Data
    sharing: Sharing = Sharing()
    stages: tuple[Stage, ...] = (Stage(),)
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    checkpoints: Checkpoints = Checkpoints()
    final: Final = Final()
    batch_size: Count = 128
    accumulate: Count = 1
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "dots", "full"] = "full"
    max_bad_steps: Count = 10
    max_skipped: Fraction = 0.05
    seed: Natural = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_output(None, self.final.to, quantize=self.final.quantize, dtype=self.final.dtype)
        kinds = [stage.kind for stage in self.stages]
        if not kinds or kinds != sorted(kinds):
            raise HeadshareError("stages must name at least one stage, and align before tied.")
        self.sharing.check(kinds[0])
        for number, stage in enumerate(self.stages):
            unused = [name for name in _ALIGN_ONLY if getattr(stage, name) != Stage.model_fields[name].default]
            if stage.kind == "tied" and unused:
                raise HeadshareError(f"stages.{number}.{unused[0]} is of align stages only; leave it out.")
        if self.batch_size % self.accumulate:
            raise HeadshareError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})."
            )
        if self.batch_size * self.data.seq_len > MOST_TOKENS:
            raise HeadshareError(
                f"A step of batch_size ({self.batch_size}) x data.seq_len ({self.data.seq_len}) tokens is more than "
                f"can be counted ({MOST_TOKENS:,}); lower either."
            )
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)


def load(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from YAML.

    Args:
      path: the file, or one of the names in `SHIPPED`.
      changes: values to use instead of the file's, as `key=value` with dots between nested keys and YAML values, such
        as `stages.0.steps=50`.

    Raises:
      HeadshareError: no file, no readable YAML, or keys or values that are not a recipe's (the nearest right key is
        named).
    """
    path = SHIPPED.get(str(path)) or storage.path(path)
    try:
        with storage.reached(path):
            content = path.read_bytes() if path.is_file() else None
        if content is None:
            found = f"{str(path)[:200]} is no file" if path.exists() else f"There is no recipe {path}"
            raise HeadshareError(f"{found}; give a .yaml file, or one of the names {', '.join(SHIPPED)}.")
    except OSError as error:
        raise HeadshareError(explained(error)) from error
    document = _parsed(content, f"The recipe {path}")
    for change in changes:
        _change(document, change)
    return from_mapping(document)


def _parsed(text: str | bytes, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    # PyYAML lets ValueError through for dates that do not exist.
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise HeadshareError(f"{what} is not readable YAML: {' '.join(str(error).split())}.") from error


def _change(document: Any, change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise HeadshareError(f"{change!r} does not have the form key=value.")
    value = _parsed(text, f"The value in {change!r}")
    *parents, last = key.split(".")
    for name in parents:
        if isinstance(document, dict):
            document = document.setdefault(name, {})
        elif isinstance(document, list) and name.isdecimal() and int(name) < len(document):
            document = document[int(name)]
        else:
            there = f"; it has {len(document)} there, counted from 0" if isinstance(document, list) else ""
            raise HeadshareError(f"The recipe has no {name} to change in {key}{there}.")
    if not isinstance(document, dict):
        raise HeadshareError(f"The recipe has no {last} to change in {key}.")
    document[last] = value


def from_mapping(document: Any) -> Recipe:
    """A recipe from plain data; raises HeadshareError as `load`."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise HeadshareError(_sentence(error)) from error


# Where pydantic's own words are Python's, not YAML's.
_SAID = {
    "model_type": "must be a mapping of keys to values",
    "tuple_type": "must be a list",
    "too_short": "must have at least one entry",
}
# By their keys, without places in lists.
_SECTIONS: dict[str, type[BaseModel]] = {"stages": Stage, "data.train": Source}
_SECTIONS |= {kind.__name__.lower(): kind for kind in (Data, Sharing, Optimizer, Mesh, Checkpoints, Final)}


def _sentence(error: ValidationError) -> str:
    """What is wrong first; an unknown key before all, since one that is missing may be spelt so."""
    entry = min(error.errors(), key=lambda entry: entry["type"] not in ("extra_forbidden", "invalid_key"))
    key, kind = ".".join(map(str, entry["loc"])), entry["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        *within, name = map(str, entry["loc"])
        section = ".".join(part for part in within if not part.isdecimal())
        keys = _SECTIONS.get(section, Recipe).model_fields
        near = difflib.get_close_matches(name, keys, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}."
        return f"The recipe has an unknown key {key}; {hint}"
    if kind == "missing":
        return f"The recipe lacks {key}."
    if kind == "value_error":
        return str(entry["ctx"]["error"])
    said = _SAID.get(kind) or entry["msg"].replace("Input should", "must")
    return f"{key or 'The recipe'} {said}, not {shown(entry['input'])}."


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every value that the run uses spelled out; `load` reads it back."""
    unused = {number: set(_ALIGN_ONLY) for number, stage in enumerate(recipe.stages) if stage.kind == "tied"}
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude={"stages": unused}), sort_keys=False)


def difference(old: Recipe, new: Recipe) -> list[str]:
    """Lines `key: old -> new` for every value that differs."""
    before, after = flat(old), flat(new)
    both = {key: (before.get(key), after.get(key)) for key in before | after}
    return [f"{key}: {first!r} -> {second!r}" for key, (first, second) in both.items() if first != second]


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every value of a recipe by its dotted key, as `stages.0.steps`."""
    return _flat(recipe.model_dump(mode="json"))


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    if not isinstance(value, dict | list):
        return {where: value}
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    parts = [_flat(entry, f"{where}.{name}" if where else str(name)) for name, entry in entries]
    return {key: item for part in parts for key, item in part.items()}
