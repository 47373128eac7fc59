"""How long `plan` takes to make Llama-2-7B slim on one accelerator: programs as compiled for it, and the host's work.

The chip need not be there: a program's seconds are the larger of its operations and of its bytes in main memory, by the
chip's published rates. What the host does is timed here, on random data of the model's size: one layer, or one batch,
of each kind. Links between the two, compiling and reading a checkpoint from its disk are not counted.
Run from the repository root: python bench/slim_time.py
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import machine, report, seconds
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pods import MODEL, TINY
from rich.table import Table

from headshare_jax.calibration import fisher, streams
from headshare_jax.calibration.own_text import cache_bytes
from headshare_jax.config import LlamaConfig
from headshare_jax.fit import moments
from headshare_jax.fit.moments import Totals, batch_features, batch_moments, behind
from headshare_jax.fit.refit import fit_weight
from headshare_jax.matching import elimination, functional
from headshare_jax.model.mesh import make_mesh
from headshare_jax.parameters import layered_names, slice_shape
from headshare_jax.plan import planning, programs
from headshare_jax.plan.costs import program_costs, round_costs
from headshare_jax.plan.estimate import Layout, Workload
from headshare_jax.plan.program import compiled
from headshare_jax.plan.topology import Chip, chip_of, topology_devices
from headshare_jax.presets import PRESETS
from headshare_jax.slim import costs, cut
from headshare_jax.slim.rounds import SlimSettings, round_targets

# A product of float32 in highest precision is six of bfloat16.
HIGHEST = 6
# Programs, how often they run, by how many bfloat16 products each of theirs is done, and whether they decode.
OnChip = tuple[str, int, int, bool, jax.stages.Lowered]
# What the host does, how often, and a function that does it once.
OnHost = tuple[str, int, Callable[[], object]]
MATCHING, SLIM = functional.FunctionalSettings(), SlimSettings()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Count `plan`: text of the model's own, functional matching, and rounds of slimming."""

    topology: str = "v5p:2x2x1"
    """Chips, of which one is used."""
    budget: float = 0.7
    """Part of attention that is left."""
    tokens: int = 49_152
    """Tokens of text."""
    seq_len: int = 512
    """Tokens of a window."""
    own: float = 0.25
    """Part of the text that the model writes."""
    quick: bool = False
    """A tiny model instead, to test this benchmark; its figures mean nothing."""
    json: Path | None = None
    """Where to write the result; bench/results/slim_time.json by default."""


class Runs(NamedTuple):
    """Batches of each kind of work, each of a layer but for the head's.

    Attributes:
      batch: windows in one.
      fit: of the refits.
      score: of scoring, in all rounds.
      match: of matching.
      steps: tokens that are written one after another.
      together: windows that are written side by side.
    """

    batch: int
    fit: int
    score: int
    match: int
    steps: int
    together: int

    @classmethod
    def of(cls, config: LlamaConfig, options: Options) -> "Runs":
        windows, batch = options.tokens // options.seq_len, SLIM.refit.batch_tokens // options.seq_len
        few, scored = (tokens // options.seq_len for tokens in (SLIM.round_tokens, SLIM.scoring_tokens))
        rounds = round_targets(options.budget)

        def fitted(windows: int) -> int:
            held = max(1, round(SLIM.refit.held_out * windows))
            return -(-(windows - held) // batch) + -(-held // batch)

        written = int(options.own * windows)
        together = max(1, cache_bytes(config, written, options.seq_len) // cache_bytes(config, 1, options.seq_len))
        return cls(
            batch,
            fitted(windows) + (len(rounds) - 1) * fitted(few),
            len(rounds) * -(-scored // batch),
            -(-MATCHING.windows // batch),
            -(-written // together) * (options.seq_len - 1),
            together,
        )


def run(options: Options) -> dict[str, Any]:
    chip, _ = chip_of(options.topology)
    config = TINY if options.quick else PRESETS[MODEL]
    runs = Runs.of(config, options)
    mesh = make_mesh((1, 1, 1), topology_devices(options.topology)[:1])
    rows = [
        {"name": name, "runs": count, "passes": passes, **counted(chip, lowered, passes, loop=loop)}
        for name, count, passes, loop, lowered in chip_work(config, options, runs, mesh)
    ]
    host = [
        {"name": name, "runs": count, "seconds": min(seconds(work) for _ in range(2))}
        for name, count, work in host_work(config, options, runs)
    ]
    return {
        "machine": machine("jax", "libtpu"),
        "options": {key: value for key, value in asdict(options).items() if key != "json"},
        "chip": rows,
        "host": host,
        "seconds": {part: sum(each["runs"] * each["seconds"] for each in found) for part, found in
                    (("chip", rows), ("host", host))},
    }  # fmt: skip


def counted(chip: Chip, lowered: jax.stages.Lowered, passes: int, *, loop: bool) -> dict[str, Any]:
    """What a program costs a chip; of one that decodes, a step."""
    text = compiled(lowered).text
    assert text is not None
    found = (round_costs if loop else program_costs)(text)
    least = max(passes * found.flops / chip.flops, found.hbm_bytes / chip.hbm_bandwidth)
    return {"flops": found.flops, "hbm_bytes": found.hbm_bytes, "seconds": least}


def chip_work(config: LlamaConfig, options: Options, runs: Runs, mesh: Mesh) -> Iterator[OnChip]:
    """What the chip runs."""

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    layer = {name: array(*slice_shape(config, name)) for name in layered_names(config)}
    x_btd, there_b = array(runs.batch, options.seq_len, config.hidden_size), array(runs.batch)
    width, layers = config.num_heads * config.head_dim, config.num_layers
    h_bti = array(*x_btd.shape[:2], width)
    forward = runs.score + runs.fit + 2 * runs.match
    yield (
        "attention",
        layers * forward,
        HIGHEST,
        False,
        streams.run_block.lower(config, layer, x_btd, "attention", mesh),
    )
    yield (
        "MLP",
        layers * (forward + runs.fit),
        HIGHEST,
        False,
        streams.run_block.lower(config, layer, x_btd, "mlp", mesh),
    )
    head = (array(config.hidden_size), array(config.vocab_size, config.hidden_size), x_btd)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), x_btd.shape[:2]))
    drawn = fisher.head_gradient.lower(config, mesh, *head, array(*keys.shape, dtype=keys.dtype))
    yield "gradient of the head", runs.score + runs.match, 1, False, drawn
    states = layer, x_btd, x_btd, there_b
    yield "costs of a layer", layers * runs.score, HIGHEST, False, costs._moments.lower(config, *states, mesh)
    yield "gradient of a layer", layers * runs.match, HIGHEST, False, fisher._backward.lower(config, *states, mesh)
    units = array(config.num_kv_heads, config.head_dim, config.head_dim)
    told = jax.eval_shape(lambda *states: costs._moments(config, *states, mesh)[1], *states)
    told = jax.tree.map(lambda each: array(*each.shape), told)
    yield "costs by width", layers * runs.score, HIGHEST, False, costs._tails.lower(config, told, units, units, mesh)
    features = batch_features.lower(config, layer, x_btd, "attention", mesh)
    yield "features of a fit", layers * runs.fit, HIGHEST, False, features
    totals = Totals.by(lambda shape: array(*shape), width, config.hidden_size)
    sums = batch_moments.lower(totals, layer, h_bti, *[x_btd] * 4, there_b, "attention", mesh)
    yield "sums of a fit", layers * runs.fit, HIGHEST, False, sums
    yield "output of a fit", layers * runs.fit, HIGHEST, False, behind.lower(layer, x_btd, h_bti, "attention", mesh)
    fits, weight = layers * len(round_targets(options.budget)), array(width, config.hidden_size)
    solution = moments.refined_solution.lower(array(width, width), weight, array())
    yield "solution of a fit", 2 * fits, HIGHEST, False, solution
    yield "error of a fit", fits, HIGHEST, False, moments.gram_product.lower(array(width, width), weight)
    yield from matching_work(config, runs, layer, x_btd, there_b, array)
    workload = Workload(config, planning.random_map(config, 0.5), "decode", runs.together, options.seq_len)
    decode, _ = programs.serving(workload, Layout((1, 1, 1)), mesh, shared=False)
    yield "a token of its own", runs.steps, 1, True, decode


def matching_work(
    config: LlamaConfig,
    runs: Runs,
    layer: dict[str, jax.ShapeDtypeStruct],
    x_btd: jax.ShapeDtypeStruct,
    there_b: jax.ShapeDtypeStruct,
    array: Callable[..., jax.ShapeDtypeStruct],
) -> Iterator[OnChip]:
    """Matching's own: sums of all donors on the first windows, of those kept on the others; and costs of pairs."""
    first = -(-min(MATCHING.prefilter, MATCHING.windows) // runs.batch)
    units, layers, group = config.num_kv_heads, config.num_layers, config.heads_per_unit
    kept = MATCHING.keep * units

    def donors(count: int) -> dict[str, jax.ShapeDtypeStruct]:
        sizes = {"q_pool_pdh": count * group, "k_pool_pdh": count, "v_pool_pdh": count}
        return {name: array(size, *layer[name].shape[1:]) for name, size in sizes.items()}

    for count, times in ((MATCHING.span * units, first), (kept, runs.match - first)):
        if not times:
            continue
        lowered = functional.batch_sums.lower(config, layer, donors(count), x_btd, there_b)
        yield f"sums of {count} donors", layers * times, HIGHEST, False, lowered
    width, size = config.num_heads * config.head_dim, group * config.head_dim
    pairs = kept + units
    solutions = array(pairs, dtype=jnp.int32), array(pairs, width, size), array(pairs, dtype=jnp.bool)
    squares = functional._squares.lower(config, layer, donors(pairs), x_btd, x_btd, *solutions)
    yield f"costs of {pairs} pairs", layers * runs.match, HIGHEST, False, squares


def host_work(config: LlamaConfig, options: Options, runs: Runs) -> Iterator[OnHost]:
    """What the host does."""
    rng, layers, rounds = np.random.default_rng(0), config.num_layers, len(round_targets(options.budget))
    width, hidden, size = config.num_heads * config.head_dim, config.hidden_size, config.head_dim

    def gram(width: int, *count: int) -> np.ndarray:
        h = rng.standard_normal((*count, width, width), np.float32)
        return np.matmul(h, np.swapaxes(h, -1, -2)).astype(np.float64)

    sums = [np.asarray(gram(width), np.float32), rng.standard_normal((2, width, hidden), np.float32), np.eye(2)]
    totals = Totals(tuple(map(jnp.asarray, sums)), tuple(jnp.zeros(each.shape) for each in sums))
    yield "sums to the host", 2 * layers * rounds, lambda: totals.moments(1)
    energy = np.eye(2) * width**2
    sums64 = moments.Moments(sums[0].astype(np.float64), sums[1].astype(np.float64), energy, 1, jax.local_devices()[0])
    # What the chip does of it is counted; here it gives what it is given.
    given = {"refined_solution": lambda gram, cross, ridge: cross, "gram_product": lambda gram, change: change}

    def fit() -> None:
        with patch.multiple(moments, **given):
            fit_weight(sums64, sums64, np.arange(width), 0, "attention", SLIM.refit)

    yield "fit of o", layers * rounds, fit
    units, rank = config.num_kv_heads, max(1, int(options.budget * size))
    path = cut.ValuePath(
        rng.standard_normal((units, hidden, size)),
        rng.standard_normal((units, size, config.heads_per_unit * hidden)),
        config.heads_per_unit,
        False,
    )
    identity = np.broadcast_to(np.eye(size), (units, size, size))
    ranks = np.full(units, rank)
    yield "cut", layers * rounds, lambda: cut.cut(path, cut.Directions(identity, identity), ranks)
    yield "balance", layers, lambda: cut.balance(path, ranks)
    grams, whole_u = gram(size, units), np.full(units, size)
    yield "directions", layers * rounds, lambda: costs.layer_directions(grams, grams, whole_u)
    weights = {name: rng.standard_normal(slice_shape(config, name), np.float32) for name in layered_names(config)}
    stored = {name: values.astype(jnp.bfloat16) for name, values in weights.items()}
    del weights
    # Forward and backward, and of matching forward again; both models of a refit.
    placed = layers * (rounds * 4 + 3)
    yield (
        "a layer to the chip",
        placed,
        lambda: jax.block_until_ready({name: jax.device_put(values) for name, values in stored.items()}),
    )
    yield from stream_work(config, options, runs)
    yield from elimination_work(config, gram)


def stream_work(config: LlamaConfig, options: Options, runs: Runs) -> Iterator[OnHost]:
    """A batch read from a stream in a temporary file and written there."""
    mesh, whole = streams.calibration_mesh(jax.local_devices()[:1]), slice(0, runs.batch)
    x_btd = jnp.zeros((runs.batch, options.seq_len, config.hidden_size))
    with streams.on_disk([np.asarray(x_btd)], x_btd.shape[1:]) as states_wtd:
        stream = streams.Stream(states_wtd, np.arange(runs.batch), mesh)

        def there_and_back() -> None:
            stream[whole] = stream[whole]

        # A fit has three streams, each read and written in two places; scoring and matching go forward and back.
        yield (
            "a batch of a stream",
            config.num_layers * (6 * runs.fit + 3 * runs.score + 5 * runs.match),
            there_and_back,
        )


def elimination_work(config: LlamaConfig, gram: Callable[..., np.ndarray]) -> Iterator[OnHost]:
    """Matching's systems."""
    units, size = config.num_kv_heads, config.heads_per_unit * config.head_dim
    width, ridge = units * size, MATCHING.ridge
    whole, kept = gram(width), MATCHING.keep * units
    inverse, rho = elimination.regular_inverse(whole, ridge)
    for count in (MATCHING.span * units, kept):
        # Of donors that do what the layer's first unit does.
        cross, own = (np.tile(each, (count, 1, 1)) for each in (whole[:, :size], whole[:size, :size]))
        yield (
            f"residuals of {count} donors",
            config.num_layers,
            lambda cross=cross, own=own: elimination.pair_residuals(whole, cross, own, whole, ridge),
        )
    rows = slice(0, size)
    yield (
        "solution of a pair",
        config.num_layers * kept,
        lambda: elimination.shared_solution(inverse, rho, cross[0], own[0], rows),
    )


def tables(result: dict[str, Any]) -> list[Table]:
    options, table = result["options"], Table("", "runs", "each", "in all")
    table.title = f"`plan` of Llama-2-7B to {options['budget']} on a chip of {options['topology']}"
    for part in ("chip", "host"):
        for row in result[part]:
            whole = row["runs"] * row["seconds"]
            table.add_row(
                f"{part}: {row['name']}", f"{row['runs']:,}", f"{1e3 * row['seconds']:.2f} ms", f"{whole:.1f} s"
            )
        table.add_row(f"{part}, in all", "", "", f"{result['seconds'][part]:.0f} s")
    table.add_row("both, one after the other", "", "", f"{sum(result['seconds'].values()):.0f} s")
    return [table]


if __name__ == "__main__":
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, topology="v5e:1x1", tokens=8192, seq_len=128)
    result = run(options)
    report("slim_time", result, tables(result), (), options.json)
