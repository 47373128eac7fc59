"""Functional matching and refit: time and memory, and how they grow with tokens, layers and heads.

Run from the repository root: python bench/fit.py
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import child_result, machine, peak_rss, report, seconds
from rich.table import Table

RATIO = 0.3
HEAD_DIM, GROUP, VOCABULARY = 64, 3, 49152


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time matching and refit on random weights: what they cost does not depend on the values."""

    layers: int = 8
    """Layers of the smallest model."""
    kv_heads: int = 3
    """Its sharing units in a layer; three query heads each, 64 wide, so that the width grows with them."""
    windows: int = 8
    """Windows of text, for both."""
    seq_len: int = 512
    """Tokens in a window."""
    quick: bool = False
    """A tiny model instead, to test this benchmark; its figures mean nothing."""
    only: bool = False
    """This one size in this process, its result printed as JSON: what this benchmark starts itself with."""
    json: Path | None = None
    """Where to write the result; bench/results/fit.json by default."""


def run(options: Options) -> dict[str, Any]:
    """The smallest size, and twice it along each axis, each in a process of its own."""
    sizes = [options]
    sizes += [replace(options, **{axis: 2 * getattr(options, axis)}) for axis in ("windows", "layers", "kv_heads")]
    rows = [in_child(size) for size in (sizes[:2] if options.quick else sizes)]
    return {
        "machine": machine("jax", "flax", "numpy", "scipy"),
        "options": {key: value for key, value in asdict(options).items() if key not in ("json", "only")},
        "sizes": rows,
    }


def in_child(options: Options) -> dict[str, Any]:
    shape = [
        f"--{key.replace('_', '-')}={getattr(options, key)}" for key in ("layers", "kv_heads", "windows", "seq_len")
    ]
    return child_result(__file__, "--only", *shape)


def one_size(options: Options) -> dict[str, Any]:
    """Seconds of both, compiling included, as a user waits for them."""
    import jax

    from headshare_jax import FunctionalSettings, Llama, LlamaConfig, match_functional, refit, share, sharing_map

    heads = GROUP * options.kv_heads
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEAD_DIM * heads,
        intermediate_size=HEAD_DIM * heads * 8 // 3,
        num_layers=options.layers,
        num_heads=heads,
        num_kv_heads=options.kv_heads,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
    )
    model = Llama.init(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    windows = rng.integers(VOCABULARY, size=(options.windows, options.seq_len), dtype=np.int32)
    before = peak_rss()
    found: list[Any] = []
    settings = FunctionalSettings(windows=options.windows)
    took = {"match": seconds(lambda: found.append(match_functional(model, windows, settings)))}
    shared = share(model, sharing_map(found[0], RATIO, chains="forbid"))
    took["refit"] = seconds(lambda: refit(model, shared, windows))
    return {
        "layers": options.layers,
        "units": config.num_units,
        "width": config.hidden_size,
        "tokens": windows.size,
        "seconds": took,
        "model_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model)),
        "peak_rss": peak_rss(),
        "rss_before": before,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    columns = ("layers", "units", "width", "tokens", "matching, s", "refit, s", "model", "peak memory")
    table = Table(*columns, title=f"functional matching, and a refit of {RATIO:.0%} of units, float32")
    for row in result["sizes"]:
        took = row["seconds"]
        table.add_row(
            *(f"{row[key]:,}" for key in ("layers", "units", "width", "tokens")),
            f"{took['match']:.1f}",
            f"{took['refit']:.1f}",
            f"{row['model_bytes'] / 1e6:,.0f} MB",
            f"{row['peak_rss'] / 1e6:,.0f} MB",
        )
    return [table]


if __name__ == "__main__":
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, layers=3, kv_heads=1, windows=2, seq_len=64)
    if options.only:
        print(json.dumps(one_size(options)))
    else:
        result = run(options)
        note = "peak memory includes Python, its libraries and the model; seconds include compiling"
        report("fit", result, tables(result), [note], options.json)
