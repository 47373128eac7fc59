"""Slim and dropped units beside a dense model: compiled for an absent TPU, beside the ledger, and run on this CPU.

Run from the repository root: python bench/slim.py [--models DENSE SLIM]
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro
from common import child_result, machine, peak_rss, report, seconds
from pods import MODEL, TINY
from rich.table import Table

from headshare_jax.config import LlamaConfig
from headshare_jax.methods.slimming import even_map
from headshare_jax.model.mesh import make_mesh
from headshare_jax.plan import planning
from headshare_jax.plan.estimate import Layout, Workload
from headshare_jax.plan.topology import chip_of, topology_devices
from headshare_jax.presets import PRESETS
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.running import running
from headshare_jax.sharing.shapes import columns, head_shapes
from headshare_jax.sharing.tie import DROPPED
from headshare_jax.sharing.widths import Widths

STAGES = ("decode", "prefill")
# What is done to units, and by how much of a head their widths spread from layer to layer and within one, as those of
# SmolLM2 at 0.7 do: of queries and keys, and of values and outputs.
MAPS = {
    "dense": None,
    "units dropped": None,
    "slim, --even model": None,
    "slim, --even": ((0.10, 0.17), (0.0, 0.0)),
    "slim": ((0.10, 0.17), (0.12, 0.155)),
}
KINDS = ("dense", "slim")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile decoding and prompts of Llama-2-7B's shapes in bfloat16 for a TPU; time a model on this CPU."""

    topology: str = "v5e:1x1"
    """Chips to compile for."""
    layers: int = 32
    """Layers of the model that is compiled."""
    stages: tuple[str, ...] = STAGES
    """Of decode and prefill."""
    maps: tuple[str, ...] = tuple(MAPS)
    """What is compiled; dense must be first."""
    kept: float = 0.7
    """Part of attention that is kept."""
    batch: int = 1
    """Texts."""
    context: int = 4096
    """Positions that decoding has room for."""
    prompt: int = 2048
    """Tokens of a prompt that is compiled."""
    models: tuple[Path, Path] | None = None
    """A dense model and its slim one, to run on this CPU; without them nothing is."""
    batches: tuple[int, ...] = (1, 8)
    """Texts that these run together."""
    tokens: tuple[int, int] = (512, 64)
    """Tokens of each prompt that is run, and tokens decoded behind it."""
    rounds: int = 3
    """Rounds in which the two take turns, each in a process of its own."""
    quick: bool = False
    """Tiny shapes once, to test this benchmark; its figures mean nothing."""
    only: tuple[Path, int] | None = None
    """A model and how many texts, run in this process, its result printed as JSON: what this benchmark starts."""
    json: Path | None = None
    """Where to write the result; bench/results/slim.json by default."""


def run(options: Options) -> dict[str, Any]:
    told = {key: value for key, value in asdict(options).items() if key not in ("json", "only", "models")}
    return {
        "machine": machine("jax", "libtpu"),
        "options": told,
        "tpu": compiled(options),
        "cpu": timed(options) if options.models else [],
    }


def compiled(options: Options) -> list[dict[str, Any]]:
    """Of each map and stage what the program costs, beside the ledger: dense's, less what the map saves by that."""
    chip, _ = chip_of(options.topology)
    config = TINY if options.quick else replace(PRESETS[MODEL], num_layers=options.layers)
    layout, rows = Layout((1, 1, 1)), []
    mesh = make_mesh(layout.mesh, topology_devices(options.topology)[:1])
    for stage in options.stages:
        length = options.context if stage == "decode" else options.prompt
        dense: dict[str, Any] = {}
        for name in options.maps:
            work = Workload(config, drawn_map(config, name, options.kept), stage, options.batch, length)
            row = planning.measured(work, layout, chip, mesh, shared=name != "dense")
            row |= {"map": name, "stage": stage, "ledger": ledger(work, row["parameter_bytes"])}
            dense = dense or row
            row["by_ledger"] = {
                cost: dense[cost] - dense["ledger"][cost] + row["ledger"][cost]
                for cost in ("flops", "hbm_bytes_accessed")
                if dense[cost] is not None
            }
            print(f"{stage}, {name}: compiled in {row['compile_seconds']:.0f} s", flush=True)
            rows.append(row)
    return rows


def ledger(work: Workload, stored: int) -> dict[str, float]:
    """What the ledger says of all that a map changes: the cache, FLOPs, and bytes that must be moved once."""
    config, batch = work.config, work.batch
    costs = running(config, work.sharing, context=work.length, batch=batch)
    if work.stage == "decode":
        flops = batch * (costs.model.projections + costs.model.attention)
    else:
        # The last layer needs keys and values alone of all but one token; a query sees half of the others on average.
        *before, last = head_shapes(config, work.sharing)
        each = config.hidden_size * (1 + config.heads_per_unit) + config.heads_per_unit * work.length / 2
        flops = 2 * batch * work.length * (columns(before) * each + columns([last]) * config.hidden_size)
    cache = costs.model.cache_bytes
    return {
        "cache_bytes": cache,
        "padding_bytes": costs.padding.cache_bytes,
        "flops": flops,
        "hbm_bytes_accessed": stored + cache,
    }


def drawn_map(config: LlamaConfig, name: str, kept: float) -> SharingMap:
    """A map that keeps a part of attention; what layers or units differ in is drawn at random."""
    if name == "slim, --even model":
        return even_map(config, kept)
    rng, shape = np.random.default_rng(0), (config.num_layers, config.num_kv_heads)
    donor, score = np.arange(config.num_units).reshape(shape), np.full(shape, np.nan)
    if name == "units dropped":
        donor.flat[rng.permutation(donor.size)[: round((1 - kept) * donor.size)]] = DROPPED
    if MAPS[name] is None:
        return SharingMap(donor, score, config.heads_per_unit)
    (pairs_l, rank_l), (pairs_u, rank_u) = MAPS[name]
    half = config.head_dim // 2

    def drawn(most: int, over_layers: float, over_units: float) -> np.ndarray:
        part = kept + over_layers * rng.standard_normal((shape[0], 1)) + over_units * rng.standard_normal(shape)
        return np.clip(np.round(most * (part + kept - part.mean())), 1, most).astype(int)

    rank, count = drawn(config.head_dim, rank_l, rank_u), drawn(half, pairs_l, pairs_u)
    order = rng.permuted(np.broadcast_to(np.arange(half), (*shape, half)), axis=2)
    widths = Widths(rank, order < count[..., None], config.head_dim)
    return SharingMap(donor, score, config.heads_per_unit, widths=widths)


def timed(options: Options) -> list[dict[str, Any]]:
    """The dense and the slim model in turns, each time in a process of its own, and the slim one's part of dense's."""
    assert options.models is not None
    rows = []
    for batch in options.batches:
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for _ in range(options.rounds):
            for kind, path in zip(KINDS, options.models, strict=True):
                sizes = ("--tokens", *map(str, options.tokens))
                found[kind].append(child_result(__file__, "--only", str(path), str(batch), *sizes))
        row: dict[str, Any] = {"batch": batch, "rounds": found}
        for cost in found["dense"][0]:
            row[cost] = {kind: median(each[cost] for each in found[kind]) for kind in KINDS}
            in_turns = zip(*(found[kind] for kind in KINDS), strict=True)
            row[cost]["ratio"] = median(slim[cost] / dense[cost] for dense, slim in in_turns)
        rows.append(row)
    return rows


def contender(options: Options) -> dict[str, float]:
    """Tokens/s of a model's prompts and of its decoding, bytes of its cache, and this process's peak memory."""
    import jax
    import jax.numpy as jnp

    import headshare_jax as hs
    from headshare_jax.cli.compiled import keep_compiled_programs
    from headshare_jax.model import generate

    assert options.only is not None
    (path, batch), (length, new) = options.only, options.tokens
    keep_compiled_programs()
    model, key, greedy = hs.load(path), jax.random.key(0), generate.Sampling()
    prompts = np.random.default_rng(0).integers(model.config.vocab_size, size=(batch, length)).tolist()
    reading, limits = generate.reading_to_decode(model, batch), (jnp.int32(new), jnp.zeros(0, jnp.int32), jnp.int32(0))
    state: list[Any] = []

    def read() -> None:
        state[:] = jax.block_until_ready(generate.read_prompts(model, prompts, new, key, greedy))

    def decode() -> None:
        settings = {"room": generate.bucket(new), "sampling": greedy, "reading": reading}
        *_, state[1] = jax.block_until_ready(generate.decode(model, *state, key, *limits, **settings))

    took = [(seconds(read), seconds(decode)) for _ in range(3)][1:]
    return {
        "prompt_tokens_per_second": batch * length / min(prompt for prompt, _ in took),
        "decoded_tokens_per_second": batch * (new - 1) / min(decoding for _, decoding in took),
        "cache_bytes": state[1].nbytes,
        "peak_rss": peak_rss(),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    options, made = result["options"], []
    for stage in options["stages"]:
        what = f"decoding at {options['context']}" if stage == "decode" else f"a prompt of {options['prompt']}"
        table = Table(
            *("", "FLOPs", "by the ledger", "HBM bytes", "by the ledger", "live", "temporaries", "cache", "padding"),
            title=f"{what} tokens, {options['layers']} layers, batch {options['batch']}, {options['topology']}",
        )
        for row in result["tpu"]:
            if row["stage"] != stage:
                continue
            by_ledger, gb = row["by_ledger"], (lambda value: "" if value is None else f"{value / 1e9:.3f} GB")
            costs = ["refused"] * 4
            if row["flops"] is not None:
                costs = [f"{row['flops'] / 1e12:.4f} T", f"{by_ledger['flops'] / 1e12:.4f} T"]
                costs += [gb(row["hbm_bytes_accessed"]), gb(by_ledger["hbm_bytes_accessed"])]
            sizes = (row["needed_bytes"], row["temporary_bytes"], row["cache_bytes"], row["ledger"]["padding_bytes"])
            table.add_row(row["map"], *costs, *map(gb, sizes))
        made.append(table)
    if result["cpu"]:
        table = Table("batch", "", *KINDS, "slim / dense", title="on this CPU, float32")
        for row in result["cpu"]:
            for cost in ("prompt_tokens_per_second", "decoded_tokens_per_second", "cache_bytes", "peak_rss"):
                scale, digits = (1e6, 1) if "bytes" in cost or "rss" in cost else (1, 1)
                values = (f"{row[cost][kind] / scale:,.{digits}f}" for kind in KINDS)
                table.add_row(str(row["batch"]), cost.replace("_", " "), *values, f"{row[cost]['ratio']:.3f}")
        made.append(table)
    return made


if __name__ == "__main__":
    options = tyro.cli(Options)
    if options.only:
        print(json.dumps(contender(options)))
        raise SystemExit
    if options.quick:
        small = {"context": 256, "prompt": 128, "maps": ("dense", "slim, --even"), "batches": (2,), "rounds": 1}
        options = replace(options, **small, tokens=(64, 4))
    result = run(options)
    report("slim", result, tables(result), [], options.json)
