"""What every method is given, and what it makes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration.journal import Journals
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.fit.refit import RefitReport
from headshare_jax.sharing.budget import check_budget
from headshare_jax.sharing.choose import receiver_count
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult
from headshare_jax.sharing.source import WeightSource
from headshare_jax.slim.choose import Rules
from headshare_jax.typed import check_fields

# Called with the steps done and in all.
Step = Callable[[int, int], None]
# Gives, for a phase by its name, what is called with its steps.
Phase = Callable[[str], AbstractContextManager[Step]]


@dataclass(frozen=True)
class MethodSettings:
    """What a method is told besides the ratio; None leaves a setting to the method.

    Attributes:
      match: match function of the methods that compare weights, `qk` by default.
      seed: of random scores, 0 by default.
      tie: projections that are shared, `qkv` by default.
      chains: as for `sharing_map`.
      within_shards: chips over which heads are cut; donors are then in their receivers' shards, and slim units take up
        as much in each. By default, any donors and widths.
      even: slim units are of one width in each `layer`, or in the whole `model`; by default each has its own.
    """

    match: str | None = None
    seed: int | None = None
    tie: str | None = None
    chains: str | None = None
    within_shards: int | None = None
    even: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        Rules(even=self.even)

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not left to the method."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def shared_tie(self) -> str:
        """The tie, or its default."""
        return self.tie or "qkv"


@dataclass(frozen=True)
class Amount:
    """How much to do without: one of the two is given.

    Attributes:
      ratio: part of the units that become receivers, or are dropped, in [0, 1).
      budget: part of the attention parameters (q, k, v and o weights) to keep, in (0, 1].
    """

    ratio: float | None = None
    budget: float | None = None

    def __str__(self) -> str:
        return f"{self.ratio:g}" if self.budget is None else f"budget {self.budget:g}"

    def check(self, config: LlamaConfig) -> None:
        """Raises HeadshareError unless it is possible and changes at least one of the model's units."""
        if self.budget is not None:
            check_budget(self.budget)
            return
        assert self.ratio is not None
        if not receiver_count(self.ratio, config.num_units):
            raise HeadshareError(
                f"A ratio of {self.ratio} makes none of {config.num_units} units a receiver; give at least "
                f"{math.ceil(1e4 / config.num_units) / 1e4}, which makes one."
            )


def silent(done: int, total: int) -> None:
    """Progress that nobody is told of."""


@dataclass(frozen=True)
class Work:
    """What a method works on.

    Attributes:
      source: the dense model, or an opened checkpoint.
      settings: what the method is told.
      windows_wt: int32 [W, T], the calibration text, for methods that need one.
      journals: where that is kept, layer by layer, which serves several amounts.
      fits: likewise, where the refit is kept that serves one.
      kept: gives the scores of a name, made by the function if they are not there already.
      phase: told what is being done.
      mesh: devices to run the text on; by default all of this process.
    """

    source: WeightSource
    settings: MethodSettings = field(default_factory=MethodSettings)
    windows_wt: np.ndarray | None = None
    journals: Journals | None = None
    fits: Journals | None = None
    kept: Callable[[str, Callable[[], MatchResult]], MatchResult] = lambda name, score: score()
    phase: Phase = lambda label: nullcontext(silent)
    mesh: Mesh | None = None

    @property
    def text_wt(self) -> np.ndarray:
        """The calibration text of a method that needs one."""
        assert self.windows_wt is not None
        return self.windows_wt


@dataclass(frozen=True)
class Made:
    """What a method made.

    Attributes:
      model: the smaller model: a view of the source, or a `Llama` if that is one and weights were fitted.
      map: what became of every unit; it names the method.
      fit: what was fitted, if anything was.
    """

    model: WeightSource
    map: SharingMap
    fit: RefitReport | None = None


@dataclass(frozen=True)
class Method(ABC):
    """A method.

    Attributes:
      name, summary: for those who choose among methods.
      uses: names of the settings that it heeds.
      by_budget: whether it takes a budget only, and no ratio.
    """

    name: str
    summary: str
    uses: tuple[str, ...] = ()
    by_budget: bool = False

    def check_ratio(self) -> None:
        """Raises HeadshareError if it takes no ratio."""
        if self.by_budget:
            raise HeadshareError(
                f"The method {self.name} needs a budget, not a ratio: it chooses itself what each unit gives up.",
                option=("budget", "ratio"),
            )

    @property
    @abstractmethod
    def needs_text(self) -> bool:
        """Whether it needs calibration text."""

    @property
    @abstractmethod
    def functional(self) -> bool:
        """Whether it scores what units compute on the text, by functional matching."""

    @property
    def own(self) -> float:
        """Part of the calibration text that the model is to write where one text alone is given."""
        return 0.0

    @property
    @abstractmethod
    def minutes(self) -> int:
        """About what it takes on two CPU cores for a billion parameters, by SmolLM2-135M and Qwen2.5-Coder-0.5B."""

    @abstractmethod
    def scored(self, work: Work) -> MatchResult | None:
        """Scores of all units that serve every ratio and budget, if it makes any; raises HeadshareError as `make`."""

    @abstractmethod
    def make(self, work: Work, amount: Amount) -> Made:
        """Makes the smaller model and its map.

        Raises:
          Unmet: so much cannot be done without.
          HeadshareError: text, model or settings are not such as the method needs, or there is no room for its files.
        """
