"""What sections of a recipe are made of, and the section on sharing."""

from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.tie import check_tie

# Far more than any memory holds the hidden states of.
MOST_REFIT_WINDOWS = 10**6


def _number(value: Any) -> Any:
    """YAML takes 5e-5, without a point, for text."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


Whole = Annotated[int, Field(strict=True)]
Count = Annotated[Whole, Field(ge=1)]
Natural = Annotated[Whole, Field(ge=0)]
Number = Annotated[float, BeforeValidator(_number), Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Weight = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Settings that cannot be changed, and no others than these."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Sharing(Section):
    """Who is to share with whom, or how slim units become: a smaller model or a map that exists, or how to make one.

    Attributes:
      start: a shared or slim model made from `model`, such as one that was fitted: its map is used, and a first `tied`
        stage begins with its weights; no other field is used then, and `refit_windows` must be 0.
      map: file of a sharing map; `ratio`, `match`, `tie` and `chains` are not used then.
      method: `slim` makes units slim, as `headshare share` does, on the windows that a refit takes, and a first `tied`
        stage begins with them; of the other fields `budget`, `even` and `refit_windows` alone are used then.
      budget: of `slim`: the part of the attention parameters to keep.
      even: of `slim`: one width for all units of a `layer` or of the `model`.
      ratio: as of `headshare share`.
      match: likewise; or `functional`, donors by what they compute on the windows that a refit takes, as the method
        `fitted` finds them.
      tie: likewise.
      chains: likewise; `functional` forbids them.
      refit_windows: windows of `data.seq_len` tokens of the training text, its first ones, that output weights are
        fitted on wherever a dense model becomes a shared one for good; 0 for no refit.
    """

    start: str | None = None
    map: str | None = None
    method: Literal["slim"] | None = None
    budget: Annotated[Number, Field(gt=0, le=1)] | None = None
    even: Literal["layer", "model"] | None = None
    ratio: Fraction = 0.3
    match: Literal["q", "k", "v", "qk", "qkv", "total", "random", "functional"] = "qk"
    tie: str = "qkv"
    chains: Literal["resolve", "forbid"] = "resolve"
    refit_windows: Annotated[Natural, Field(le=MOST_REFIT_WINDOWS)] = 0

    def check(self, first: str) -> None:
        """Raises HeadshareError unless its fields go together, and with a first stage of a kind."""
        check_tie(self.tie)
        if self.refit_windows == 1:
            raise HeadshareError("sharing.refit_windows must be 0, or at least 2, as one is held out.")
        if self.method is not None:
            self._check_slim(first)
        elif self.budget is not None or self.even is not None:
            name = "even" if self.budget is None else "budget"
            raise HeadshareError(f"sharing.{name} is of sharing.method slim alone; leave it out, or give the method.")
        elif self.start is not None:
            if self.map is not None:
                raise HeadshareError("sharing.start has a map of its own; leave sharing.map out.")
            if self.refit_windows:
                raise HeadshareError("sharing.start is a shared model already; leave sharing.refit_windows out.")
            if first != "tied":
                raise HeadshareError("sharing.start is where a tied stage begins, but the first stage is align.")
        elif self.map is None and self.match == "functional" and not self.refit_windows:
            raise HeadshareError("sharing.match functional looks at text; give sharing.refit_windows, such as 24.")

    def _check_slim(self, first: str) -> None:
        fields = type(self).model_fields
        for name in ("start", "map", "ratio", "match", "tie", "chains"):
            if getattr(self, name) != fields[name].default:
                raise HeadshareError(f"sharing.method slim has no use for sharing.{name}; leave it out.")
        if self.budget is None:
            raise HeadshareError("sharing.method slim needs sharing.budget, the part of attention to keep: 0.7.")
        if not self.refit_windows:
            raise HeadshareError("sharing.method slim looks at text; give sharing.refit_windows, such as 24.")
        if first != "tied":
            raise HeadshareError("sharing.method slim makes no receivers to align; let the first stage be tied.")
