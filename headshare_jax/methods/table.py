"""The one table of methods."""

from headshare_jax.errors import HeadshareError
from headshare_jax.methods.scored import (
    ScoredMethod,
    functional_scores,
    least_dropped,
    magnitude_scores,
    random_scores,
    weight_scores,
)
from headshare_jax.methods.slimming import SlimMethod
from headshare_jax.methods.work import Method, MethodSettings

_PAIRS = ("tie", "chains", "within_shards")
_BY_WEIGHTS = ("match", "seed", *_PAIRS)
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        ScoredMethod("direct", "the paper's DirectShare", _BY_WEIGHTS, scores=weight_scores),
        ScoredMethod("refit", "direct, then output weights fitted", _BY_WEIGHTS, scores=weight_scores, refits=True),
        ScoredMethod(
            "fitted", "refit, with donors by what they compute", _PAIRS, scores=functional_scores, refits=True
        ),
        SlimMethod("plan", "keep, slim, share or drop each unit, then refit", ("within_shards",), shares=True),
        SlimMethod("slim", "keep the columns of each head that matter most, then refit", ("even", "within_shards")),
        ScoredMethod(
            "drop", "drop the units that matter least, then refit",
            scores=functional_scores, choose=least_dropped, refits=True,
        ),
        ScoredMethod(
            "magnitude", "drop the smallest units, then refit",
            scores=magnitude_scores, choose=least_dropped, refits=True,
        ),
        ScoredMethod("random", "pairs drawn at random, a baseline", ("seed", *_PAIRS), scores=random_scores),
        ScoredMethod(
            "random-refit", "pairs drawn at random, then refit", ("seed", *_PAIRS), scores=random_scores, refits=True
        ),
    )
}  # fmt: skip


def find(name: str, settings: MethodSettings | None = None) -> Method:
    """The method of a name.

    Raises:
      HeadshareError: there is none of this name, or it does not heed a setting that was given.
    """
    if name not in METHODS:
        raise HeadshareError(f"The method must be one of {', '.join(METHODS)}, not {name!r}.", option="method")
    method, settings = METHODS[name], settings or MethodSettings()
    if settings.seed is not None and "match" in method.uses and settings.match != "random":
        raise HeadshareError(f"The method {name} draws nothing unless match is random; leave seed out.", option="seed")
    for setting in settings.given:
        if setting not in method.uses:
            users = ", ".join(other.name for other in METHODS.values() if setting in other.uses)
            raise HeadshareError(
                f"The method {name} has no use for {setting} (these have: {users}); leave it out.", option=setting
            )
    return method
