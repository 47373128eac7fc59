"""Options of a method, which the commands that share have in common."""

from typing import Annotated

import tyro

from headshare_jax.cli import kinds
from headshare_jax.loading import Texts
from headshare_jax.slim.choose import EVEN

Calibrate = Annotated[
    tyro.conf.UseAppendAction[tuple[kinds.WeightedText, ...]],
    tyro.conf.arg(
        metavar="TEXT",
        help="Text to choose and fit on, like that which the model is to be used on: text, JSONL or parquet file, or "
        "data set name[:config[:split]]; of its train split. Give it again for several texts, each perhaps with its "
        "weight: --calibrate 2@wiki.txt --calibrate code.txt. own: text that the model writes, which serves less well.",
    ),
]
CalibrateTokens = Annotated[kinds.Count, tyro.conf.arg(help="Tokens of these texts to use, from their starts.")]
SeqLen = Annotated[kinds.WindowLength, tyro.conf.arg(help="Tokens in a window of text.")]
MeasuredText = Annotated[
    kinds.TextName | None,
    tyro.conf.arg(help="Text to measure both models on, as for eval; by default what is left of the other text."),
]
NoEval = Annotated[bool, tyro.conf.arg(help="Measure no perplexity.")]
MatchFunction = Annotated[
    kinds.MatchFunction | None,
    tyro.conf.arg(
        help="Score of a pair for methods that compare weights: cosine of q, k, v, qk (by default), qkv or total "
        "weights; or random."
    ),
]
Tie = Annotated[
    kinds.Tie | None, tyro.conf.arg(help="Projections to share: some of q, k, v, o, in that order; qkv by default.")
]
Even = Annotated[
    Annotated[str, kinds.OneOf(*EVEN)] | None,
    tyro.conf.arg(
        metavar="[TEXT]",
        help="Slim: one width for all units of a layer, or of the model (--even model), for hardware and formats "
        "that want it; by default each unit has its own, which costs least.",
    ),
]
Seed = Annotated[kinds.Seed | None, tyro.conf.arg(help="Seed of random scores; 0 by default.")]


def calibration(given: tuple[str, ...]) -> Texts | None:
    """What the library takes for the texts that were given."""
    if len(given) < 2:
        return kinds.weighted(given[0])[0] if given else None
    return [kinds.weighted(each) for each in given]
