"""What may be done to a unit: a tie says which projections it takes from its donor; a dropped unit has none."""

from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PROJECTIONS

# In place of a donor: the unit is dropped, its output is zero, and nothing of it is stored.
DROPPED = -1


def check_tie(tie: str) -> str:
    """The tie itself; raises HeadshareError unless it is a non-empty subset of `qkvo` in that order."""
    if not tie or tie != "".join(projection for projection in PROJECTIONS if projection in tie):
        raise HeadshareError(f"The tie must name some of q, k, v, o in that order (such as qkv or qk), not {tie!r}.")
    return tie
