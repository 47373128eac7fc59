"""Options of a method, which the commands that share have in common."""

from typing import Annotated

import tyro

Calibrate = Annotated[
    str | None,
    tyro.conf.arg(
        help="Text to choose donors and fit on: text, JSONL or parquet file, or data set name[:config[:split]]; of its "
        "train split."
    ),
]
CalibrateTokens = Annotated[int, tyro.conf.arg(help="Tokens of that text to use, from its start.")]
SeqLen = Annotated[int, tyro.conf.arg(help="Tokens in a window of text.")]
MatchFunction = Annotated[
    str | None,
    tyro.conf.arg(
        help="Score of a pair for methods that compare weights: cosine of q, k, v, qk (by default), qkv or total "
        "weights; or random."
    ),
]
Tie = Annotated[
    str | None, tyro.conf.arg(help="Projections to share: some of q, k, v, o, in that order; qkv by default.")
]
Seed = Annotated[int | None, tyro.conf.arg(help="Seed of random scores; 0 by default.")]
