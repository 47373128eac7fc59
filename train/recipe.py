"""Recipes: everything that defines a PostShare run, read from YAML and checked."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from headshare_jax.errors import HeadshareError
from headshare_jax.matching.cosine import MATCH_FUNCTIONS
from headshare_jax.model.layer import REMAT_POLICIES
from headshare_jax.model.llama import COMPUTE_DTYPES
from headshare_jax.sharing.map import check_tie
from headshare_jax.train.losses import PENALTIES

T = TypeVar("T")

STAGES = ("align", "tied")
CHAINS = ("resolve", "forbid")
SCHEDULES = ("cosine", "wsd", "constant")
WEIGHT_SCHEDULES = ("constant", "linear", "cosine")
# Recipes that come with the package, by name.
SHIPPED = {path.stem: path for path in sorted(Path(__file__).with_name("recipes").glob("*.yaml"))}
# Settings of the penalty, which `tied` stages do not have; the next-token loss has weight 1 there.
_ALIGN_ONLY = ("lm_weight", "sim_weight", "sim_schedule", "penalty")


@dataclass(frozen=True)
class Sharing:
    """Who is to share with whom: a shared model or a map that exists, or how to make one.

    Attributes:
      start: a shared model made from `model`, such as one that was fitted: its map is used, and a first `tied` stage
        begins with its weights; no other field is used then, and `refit_windows` must be 0.
      map: file of a sharing map; `ratio`, `match`, `tie` and `chains` are not used then.
      ratio: as of `headshare share`.
      match: likewise.
      tie: likewise.
      chains: likewise.
      refit_windows: windows of `data.seq_len` tokens of the training text, its first ones, that output weights are
        fitted on wherever a dense model becomes a shared one for good; 0 for no refit.
    """

    start: str | None = None
    map: str | None = None
    ratio: float = 0.3
    match: str = "qk"
    tie: str = "qkv"
    chains: str = "resolve"
    refit_windows: int = 0


@dataclass(frozen=True)
class Data:
    """Text to train and to evaluate on.

    Attributes:
      train: text, JSONL or parquet file, or data set `name[:config[:split]]` (split `train` by default).
      eval: held-out text of the same kinds; None for no evaluation.
      text_field: field or column that holds the text.
      seq_len: tokens in a training block.
      workers: threads that tokenise.
      eval_windows: windows of `seq_len` tokens to evaluate on.
    """

    train: str
    eval: str | None = None
    text_field: str = "text"
    seq_len: int = 4096
    workers: int = 1
    eval_windows: int = 16


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its learning rate; the defaults are the paper's (section 4.1).

    Attributes:
      schedule: `cosine` to `end_rate` times the peak; `wsd`, constant and then linear over the last fifth; `constant`.
      warmup: steps of linear warm-up.
      weight_decay: of matrices; norms and biases have none.
      clip: most that the global norm of the gradients may be.
    """

    schedule: str = "cosine"
    warmup: int = 0
    end_rate: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Stage:
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

    kind: str = "align"
    steps: int = 1000
    learning_rate: float = 5e-5
    lm_weight: float = 0.5
    sim_weight: float = 0.5
    sim_schedule: str = "constant"
    penalty: str = "norm"
    z_weight: float = 0.0
    distill_weight: float = 0.0
    temperature: float = 1.0
    trainable: str = "all"


@dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh; one may be -1, for all devices that the others leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class Checkpoints:
    """When to save and evaluate, in steps, and how many of the last checkpoints to keep besides the best."""

    every: int = 200
    keep: int = 2
    eval_every: int = 200


@dataclass(frozen=True)
class Recipe:
    """A PostShare run.

    Attributes:
      model: native or Hugging Face folder, .gguf file, or hub id.
      batch_size: sequences in a step, over all devices and accumulation steps.
      accumulate: parts that a step's batch is cut into, run one after another.
      compute_dtype: `float32` or `bfloat16`; master weights and optimizer state are float32.
      remat: `none`, `dots` or `full`.
      max_bad_steps: steps in a row whose loss or gradients may be NaN or infinite (they are skipped) before it stops.
      seed: of the order of the blocks.
    """

    model: str
    data: Data
    sharing: Sharing = field(default_factory=Sharing)
    stages: tuple[Stage, ...] = (Stage(),)
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    batch_size: int = 128
    accumulate: int = 1
    compute_dtype: str = "bfloat16"
    remat: str = "full"
    max_bad_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for key, value in _flat(_plain(dataclasses.asdict(self))).items():
            name = key.rsplit(".", 1)[-1]
            if name in _CHOICES and value not in _CHOICES[name]:
                raise HeadshareError(f"{key} must be one of {', '.join(_CHOICES[name])}, not {value!r}.")
            for names, allowed, words in _LIMITS:
                if name in names.split() and not allowed(value):
                    raise HeadshareError(f"{key} must be {words}, not {value}.")
        check_tie(self.sharing.tie)
        if self.sharing.start is not None and self.sharing.map is not None:
            raise HeadshareError("sharing.start has a map of its own; leave sharing.map out.")
        if self.sharing.start is not None and self.sharing.refit_windows:
            raise HeadshareError(
                "sharing.start is a shared model already, so that none is refitted; leave sharing.refit_windows out."
            )
        kinds = [stage.kind for stage in self.stages]
        if not kinds or kinds != sorted(kinds):
            raise HeadshareError("stages must name at least one stage, and align before tied.")
        if self.sharing.start is not None and kinds[0] != "tied":
            raise HeadshareError("sharing.start is where a tied stage begins, but the first stage is align.")
        for number, stage in enumerate(self.stages):
            unused = [name for name in _ALIGN_ONLY if getattr(stage, name) != getattr(Stage, name)]
            if stage.kind == "tied" and unused:
                raise HeadshareError(f"stages.{number}.{unused[0]} is of align stages only; leave it out.")
        if self.batch_size % self.accumulate:
            raise HeadshareError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})."
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)


# What values may be, by the last part of their keys.
_CHOICES: dict[str, tuple[str, ...]] = {
    "match": MATCH_FUNCTIONS,
    "chains": CHAINS,
    "kind": STAGES,
    "penalty": PENALTIES,
    "sim_schedule": WEIGHT_SCHEDULES,
    "schedule": SCHEDULES,
    "compute_dtype": COMPUTE_DTYPES,
    "remat": tuple(REMAT_POLICIES),
}
_COUNTS = "steps batch_size accumulate workers eval_windows every eval_every keep max_bad_steps"
_WEIGHTS = "lm_weight sim_weight z_weight distill_weight weight_decay warmup seed"
_LIMITS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (_COUNTS, lambda value: value >= 1, "at least 1"),
    ("seq_len", lambda value: value >= 2, "at least 2"),
    ("refit_windows", lambda value: value == 0 or value >= 2, "0, or at least 2, as one is held out"),
    ("learning_rate temperature clip eps", lambda value: value > 0, "positive"),
    (_WEIGHTS, lambda value: value >= 0, "at least 0"),
    ("end_rate", lambda value: 0 <= value <= 1, "from 0 to 1"),
    ("ratio beta1 beta2", lambda value: 0 <= value < 1, "at least 0 and below 1"),
)


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
    path = SHIPPED.get(str(path), Path(path))
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise HeadshareError(
            f"There is no recipe {path}; give a .yaml file, or one of the names {', '.join(SHIPPED)}."
        ) from error
    # PyYAML lets ValueError through for dates that do not exist, and for what is no text.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise HeadshareError(f"The recipe {path} is not readable YAML: {' '.join(str(error).split())}.") from error
    for change in changes:
        document = _changed(document, change)
    return from_mapping(document)


def _changed(document: Any, change: str) -> Any:
    key, equals, text = change.partition("=")
    try:
        value = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise HeadshareError(f"The value in {change!r} is not readable YAML.") from error
    if not equals or not key:
        raise HeadshareError(f"{change!r} does not have the form key=value.")
    *parents, last = key.split(".")
    place = document
    for name in parents:
        if isinstance(place, dict):
            place = place.setdefault(name, {})
        elif isinstance(place, list) and name.isdecimal() and int(name) < len(place):
            place = place[int(name)]
        else:
            there = f"; it has {len(place)} there, counted from 0" if isinstance(place, list) else ""
            raise HeadshareError(f"The recipe has no {name} to change in {key}{there}.")
    if not isinstance(place, dict):
        raise HeadshareError(f"The recipe has no {last} to change in {key}.")
    place[last] = value
    return document


def from_mapping(document: Any) -> Recipe:
    """A recipe from plain data; raises HeadshareError as `load`."""
    return _build(Recipe, document, "")


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every value that the run uses spelled out; `load` reads it back."""
    document = _plain(dataclasses.asdict(recipe))
    for stage in document["stages"]:
        if stage["kind"] == "tied":
            for name in _ALIGN_ONLY:
                del stage[name]
    return yaml.safe_dump(document, sort_keys=False)


def difference(old: Recipe, new: Recipe) -> list[str]:
    """Lines `key: old -> new` for every value that differs."""
    before, after = (_flat(_plain(dataclasses.asdict(recipe))) for recipe in (old, new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _build(kind: type[T], document: Any, where: str) -> T:
    if not isinstance(document, Mapping):
        raise HeadshareError(f"{where or 'The recipe'} must be a mapping of keys to values, not {document!r}.")
    hints = typing.get_type_hints(kind)
    for key in document:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(hints)}."
            raise HeadshareError(f"The recipe has an unknown key {_joined(where, key)}; {hint}")
    values = {key: _value(hints[key], value, _joined(where, key)) for key, value in document.items()}
    # That every kind is a dataclass is nothing that its type can say, here and in `_value`.
    required = [f.name for f in dataclasses.fields(kind) if _is_required(f)]  # type: ignore[arg-type]
    missing = [name for name in required if name not in values]
    if missing:
        raise HeadshareError(f"The recipe lacks {', '.join(_joined(where, name) for name in missing)}.")
    return kind(**values)


def _is_required(entry: "dataclasses.Field[Any]") -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _value(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        return None if value is None else _value(typing.get_args(kind)[0], value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise HeadshareError(f"{where} must be a list, not {value!r}.")
        return tuple(_value(typing.get_args(kind)[0], item, f"{where}.{place}") for place, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)  # type: ignore[arg-type]
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    try:
        if kind is float and isinstance(value, (str, int)) and not isinstance(value, bool):
            # YAML takes 5e-5, without a point, for text.
            value = float(value)
    except (ValueError, OverflowError):
        pass
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise HeadshareError(f"{where} must be {names[kind]}, not {value!r}.")
    return value


def _joined(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {where: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, _joined(where, key))
    return flat
