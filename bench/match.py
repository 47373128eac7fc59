"""Matching all heads of a model, against a PyTorch loop over pairs of heads and against plain matrix products.

Run from the repository root: python bench/match.py
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import child_result, cores, machine, peak_rss, report, seconds
from rich.table import Table

from headshare_jax import LlamaConfig, fingerprint, match
from headshare_jax.matching import cosine


@dataclass(frozen=True, kw_only=True)
class Options:
    """Match random weights of the shape of Llama-2-7B, 8 of its 32 layers."""

    layers: int = 8
    heads: int = 32
    width: int = 4096
    head_dim: int = 128
    repeats: int = 5
    """The best time of so many is taken, but of the loop over pairs."""
    loops: int = 3
    """The loop runs once over all pairs in so many processes; the median time counts."""
    matrices: tuple[int, ...] = (2048, 4096)
    """Sizes of the square matrices whose product is the limit."""
    block_bytes: int = cosine.BLOCK_BYTES
    """As in `headshare_jax.match`."""
    quick: bool = False
    """A tiny model instead, to test this benchmark; its figures mean nothing."""
    only_pytorch: bool = False
    """PyTorch's side in this process, its result printed as JSON: what this benchmark starts itself with."""
    json: Path | None = None
    """Where to write the result; bench/results/match.json by default."""


class RandomWeights:
    """Random attention weights in float32, served layer by layer."""

    sharing = None

    def __init__(self, options: Options):
        heads, width, head_dim = options.heads, options.width, options.head_dim
        self.config = LlamaConfig(
            vocab_size=2,
            hidden_size=width,
            intermediate_size=2,
            num_layers=options.layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
        )
        rng = np.random.default_rng(0)
        shapes = {f"{letter}_pool_pdh": (heads, width, head_dim) for letter in "qkv"}
        shapes["o_pool_phd"] = (heads, head_dim, width)
        self.weights = {
            (name, layer): rng.standard_normal(shape, np.float32)
            for layer in range(options.layers)
            for name, shape in shapes.items()
        }

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        assert layer is not None
        value: np.ndarray = self.weights[name, layer]
        return value if rows is None else value[list(rows)]


def run(options: Options) -> dict[str, Any]:
    """Measures everything; peak memory first, before there is anything but the weights and the matching."""
    where, libraries = machine("jax", "numpy", "torch"), peak_rss()
    source = RandomWeights(options)
    first = seconds(lambda: match(source, "qk", block_bytes=options.block_bytes))
    peak = peak_rss()
    times, rates = best_times(source, options)
    rivals = [in_child(options) for _ in range(options.loops)]
    loop = statistics.median(rival["loop"] for rival in rivals)

    pairs = options.layers * (options.layers - 1) // 2 * options.heads**2
    layer_bytes = 4 * options.heads * 2 * options.width * options.head_dim
    gflops = 2 * 2 * options.width * options.head_dim * pairs / times["scores"] / 1e9
    weights_bytes = sum(value.nbytes for value in source.weights.values())
    return {
        "machine": where,
        "options": {key: value for key, value in asdict(options).items() if key not in ("json", "only_pytorch")},
        "pairs": pairs,
        "layers_per_block": max(1, min(options.layers, options.block_bytes // layer_bytes)),
        "seconds": {
            "first_match": first,
            **times,
            "pytorch_loop": loop,
            "pytorch_stacked": min(rival["stacked"] for rival in rivals),
        },
        "loops": [rival["loop"] for rival in rivals],
        "speedup": {name: loop / times[name] for name in ("match", "scores")},
        "largest_difference": max(rival["largest_difference"] for rival in rivals),
        "matmul_gflops": rates,
        "gflops": gflops,
        "fraction_of_matmul": gflops / max(rates.values()),
        "bytes": {"weights": weights_bytes, "libraries": libraries, "peak_rss": peak},
        "growth": growth(source, options),
    }


def scores(source: RandomWeights, options: Options, layers: int) -> np.ndarray:
    """All cosines and nothing else, the source's reads included."""

    def read(layer: int) -> list[np.ndarray]:
        return [source.read(name, layer) for name in ("q_pool_pdh", "k_pool_pdh")]

    dim = 2 * options.width * options.head_dim
    return cosine.cosine_scores(read, layers, options.heads, dim, block_bytes=options.block_bytes)


def best_times(source: RandomWeights, options: Options) -> tuple[dict[str, float], dict[str, float]]:
    """Best seconds of match and its two parts, and best GFLOP/s of matrix products, measured in turns."""
    functions: dict[str, Callable[[], Any]] = {
        "match": lambda: match(source, "qk", block_bytes=options.block_bytes),
        "scores": lambda: scores(source, options, options.layers),
        "fingerprint": lambda: fingerprint(source),
    }
    matmul = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))

    def multiply(matrix: jax.Array) -> None:
        matmul(matrix).block_until_ready()

    products: dict[str, tuple[int, Callable[[], Any]]] = {}
    for size in options.matrices:
        matrix = np.random.default_rng(0).standard_normal((size, size), np.float32)
        products[f"NumPy, {size} x {size}"] = size, partial(np.matmul, matrix, matrix)
        products[f"JAX, {size} x {size}"] = size, partial(multiply, jnp.asarray(matrix))
    times, rates = dict.fromkeys(functions, math.inf), dict.fromkeys(products, 0.0)
    for _, product in products.values():
        product()
    for name, function in functions.items():
        for _ in range(options.repeats):
            for key, (size, product) in products.items():
                rates[key] = max(rates[key], 2e-9 * size**3 / seconds(product))
            times[name] = min(times[name], seconds(function))
    return times, rates


def in_child(options: Options) -> dict[str, float]:
    """PyTorch's side in a process of its own: what its loop takes depends on what was allocated before."""
    shape = ("layers", "heads", "width", "head_dim", "repeats")
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in shape]
    return child_result(__file__, "--only-pytorch", *arguments)


def pytorch(options: Options) -> dict[str, float]:
    """Seconds of a loop over all pairs, best of one stacked product; the loop's largest difference from ours."""
    # Only here, so that it has no part in the memory that matching takes.
    import torch

    torch.set_num_threads(cores())
    source = RandomWeights(options)
    layers, heads = options.layers, options.heads
    q, k = ([torch.from_numpy(source.read(f"{letter}_pool_pdh", layer)) for layer in range(layers)] for letter in "qk")

    def vector(layer: int, head: int) -> torch.Tensor:
        return torch.cat([q[layer][head].flatten(), k[layer][head].flatten()])

    def stacked() -> torch.Tensor:
        units = torch.stack([vector(layer, head) for layer in range(layers) for head in range(heads)])
        units /= units.norm(dim=1, keepdim=True)
        return units @ units.T

    cosines = np.zeros((layers, heads, layers, heads), np.float32)

    def loop() -> None:
        for layer, head in np.ndindex(layers, heads):
            for donor_layer, donor_head in np.ndindex(layer, heads):
                cosines[layer, head, donor_layer, donor_head] = torch.nn.functional.cosine_similarity(
                    vector(layer, head), vector(donor_layer, donor_head), dim=0
                ).item()

    took = seconds(loop)
    ours = np.where(cosines, scores(source, options, layers).reshape(cosines.shape), 0.0)
    return {
        "loop": took,
        "stacked": min(seconds(stacked) for _ in range(options.repeats)),
        "largest_difference": float(np.max(np.abs(ours - cosines))),
    }


def growth(source: RandomWeights, options: Options) -> list[dict[str, float]]:
    """Seconds of all cosines of the first 2, 4, 8, ... layers."""
    rows = []
    for layers in (2**power for power in range(1, options.layers.bit_length()) if 2**power <= options.layers):
        scores(source, options, layers)
        took = min(seconds(partial(scores, source, options, layers)) for _ in range(options.repeats))
        pairs = layers * (layers - 1) // 2 * options.heads**2
        rows.append({"layers": layers, "pairs": pairs, "seconds": took, "microseconds_per_pair": took / pairs * 1e6})
    return rows


def tables(result: dict[str, Any]) -> list[Table]:
    times = result["seconds"]
    compared = Table("", "seconds", "times the loop's speed", title=f"{result['pairs']:,} pairs of heads")
    loop = times["pytorch_loop"]
    for name, took in {
        "PyTorch, pair by pair": loop,
        "PyTorch, one product, all heads in memory": times["pytorch_stacked"],
        "headshare, match, first call": times["first_match"],
        "headshare, match": times["match"],
        "  of it all cosines": times["scores"],
        "  of it the fingerprint of the weights": times["fingerprint"],
    }.items():
        compared.add_row(name, f"{took:.2f}", "" if "fingerprint" in name else f"{loop / took:,.0f}x")
    limit = Table("", "GFLOP/s", "of the best product", title="all cosines against matrix products")
    best = max(result["matmul_gflops"].values())
    for name, rate in result["matmul_gflops"].items():
        limit.add_row(f"float32 product, {name}", f"{rate:.1f}", f"{rate / best:.0%}")
    limit.add_row("all cosines", f"{result['gflops']:.1f}", f"{result['fraction_of_matmul']:.0%}")
    grown = Table("layers", "pairs", "seconds", "microseconds a pair", title="growth with depth")
    for row in result["growth"]:
        grown.add_row(*(f"{row[key]:{form}}" for key, form in zip(row, ("", ",", ".3f", ".1f"), strict=True)))
    return [compared, limit, grown]


def notes(result: dict[str, Any]) -> list[str]:
    sizes = result["bytes"]
    return [
        f"the loop took {', '.join(f'{took:.1f}' for took in result['loops'])} s; the median counts",
        f"peak RSS {sizes['peak_rss'] / 1e6:,.0f} MB, of it the weights {sizes['weights'] / 1e6:,.0f} MB, "
        f"Python and libraries {sizes['libraries'] / 1e6:,.0f} MB; blocks of {result['layers_per_block']} layers",
        f"largest difference from PyTorch's cosines: {result['largest_difference']:.1e}",
    ]


def tiny(json: Path | None) -> Options:
    return Options(
        heads=8, width=256, head_dim=32, repeats=2, loops=1, matrices=(256,), block_bytes=2**20, quick=True, json=json
    )


if __name__ == "__main__":
    options = tyro.cli(Options)
    if options.quick:
        options = tiny(options.json)
    if options.only_pytorch:
        print(json.dumps(pytorch(options)))
    else:
        result = run(options)
        report("match", result, tables(result), notes(result), options.json)
