"""Maps for tests: documents of valid ones, and any of a small model, drawn by hypothesis."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import strategies as st

from headshare_jax import LlamaConfig, SharingMap
from headshare_jax.sharing.tie import DROPPED
from headshare_jax.sharing.widths import Widths

TIES = tuple("".join(letters) for size in range(1, 5) for letters in combinations("qkvo", size))
VALID: dict[str, Any] = {
    "format": "headshare-map",
    "version": 1,
    "model": {"num_layers": 3, "units_per_layer": 2, "heads_per_unit": 2},
    "tie": "qkv",
    "method": "direct",
    "match": "qk",
    "chains": "resolve",
    "ratio": 0.4,
    "seed": None,
    "source": "sha256:0",
    "receivers": [
        {"layer": 1, "unit": 1, "donor": [0, 0], "score": 0.25},
        {"layer": 2, "unit": 0, "donor": [0, 1], "tie": "qk", "score": None},
    ],
    "dropped": [{"layer": 2, "unit": 1, "score": 0.5}],
}
# Heads of 8 columns, 4 of which turn: pairs 0 and 1 turn, columns 4 to 7 are their pairs 2 to 5.
SLIM: dict[str, Any] = VALID | {
    "version": 2,
    "model": VALID["model"] | {"head_dim": 8, "rotary_dim": 4},
    "slim": [
        {"layer": 1, "unit": 0, "rank": 3, "pairs": [1, 2, 5], "score": -0.25},
        {"layer": 0, "unit": 1, "rank": 8, "pairs": [0]},
    ],
    "receivers": VALID["receivers"][:1],
}


@st.composite
def maps(draw: st.DrawFn) -> SharingMap:
    """Any valid map of a small model, with ties and drops; donors need not be in earlier layers."""
    layers, units = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    size = layers * units
    roots = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
    tie, uniform = draw(st.sampled_from(TIES)), draw(st.booleans())
    donor, score, unit_tie = np.arange(size), np.full(size, np.nan), np.full(size, "", "<U4")
    for unit in set(range(size)) - set(roots):
        donor[unit] = draw(st.sampled_from([*roots, DROPPED]))
        score[unit] = draw(st.floats(-1, 1) | st.just(np.nan))
        if donor[unit] != DROPPED:
            unit_tie[unit] = tie if uniform else draw(st.sampled_from(TIES))
    return SharingMap(
        donor.reshape(layers, units),
        score.reshape(layers, units),
        heads_per_unit=draw(st.integers(1, 3)),
        tie=tie,
        unit_tie=None if uniform else unit_tie.reshape(layers, units),
        match=draw(st.none() | st.text(max_size=5)),
        ratio=draw(st.none() | st.floats(0, 1, exclude_max=True)),
        seed=draw(st.none() | st.integers(0, 2**40)),
        source=draw(st.none() | st.text(max_size=5)),
    )


@st.composite
def slim_maps(draw: st.DrawFn) -> SharingMap:
    """A map as `maps` gives them, of which any units that keep their weights for themselves are slim."""
    sharing, head_dim = draw(maps()), draw(st.sampled_from([2, 4, 6]))
    count = head_dim - draw(st.integers(1, head_dim // 2))
    rank, pairs = np.full(sharing.donor.shape, head_dim), np.ones((*sharing.donor.shape, count), bool)
    score = sharing.score.copy()
    donors = set(sharing.donor.flat[sharing.receivers])
    for flat in np.flatnonzero(~sharing.receives & ~sharing.dropped):
        place = np.unravel_index(flat, score.shape)
        if flat not in donors and draw(st.booleans()):
            rank[place] = draw(st.integers(1, head_dim))
            pairs[place] = np.isin(np.arange(count), list(draw(st.sets(st.integers(0, count - 1), min_size=1))))
            score[place] = draw(st.floats(-1, 0)) if rank[place] < head_dim or not pairs[place].all() else np.nan
    return replace(sharing, widths=Widths(rank, pairs, head_dim), score=score)


def config_of(sharing: SharingMap) -> LlamaConfig:
    layers, units = sharing.donor.shape
    return LlamaConfig(
        vocab_size=11,
        hidden_size=6,
        intermediate_size=7,
        num_layers=layers,
        num_heads=units * sharing.heads_per_unit,
        num_kv_heads=units,
        head_dim=4,
        attention_bias=True,
    )


def slim_units(*units: tuple[int, int, int, list[Any]]) -> list[dict[str, Any]]:
    return [{"layer": layer, "unit": unit, "rank": rank, "pairs": pairs} for layer, unit, rank, pairs in units]
