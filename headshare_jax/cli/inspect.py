"""`headshare inspect`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from headshare_jax import convert, parameters
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command, Source
from headshare_jax.sharing.budget import crossing_parameters
from headshare_jax.sharing.ledger import NOT_SAVED, ledger, megabytes
from headshare_jax.sharing.map import shard_of_units
from headshare_jax.sharing.source import stored_shape


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """Show a model's architecture, who shares with whom, and what it stores.

    Example: headshare inspect smollm2-shared

    Attributes:
      shards: Count what must move if so many chips share out the heads of each layer evenly.
    """

    src: Source
    shards: kinds.Count | None = None

    def run(self) -> dict[str, Any]:
        path = convert.locate(self.src)
        source = convert.open_checkpoint(path)
        config, sharing = source.config, source.sharing
        return {
            "path": str(path),
            "config": config.to_json(),
            "parameters": {
                name: {"shape": stored_shape(config, name, sharing), "dtype": str(source.dtype(name))}
                for name in parameters.parameter_names(config)
            },
            "map": None if sharing is None else json.loads(sharing.to_json()),
            "ledger": ledger(source, path=source.path).to_json(),
            "shards": None if self.shards is None else self._crossing(source, self.shards),
        }

    def _crossing(self, source: convert.Checkpoint, shards: int) -> dict[str, int]:
        """What receivers need of other shards in a pass through all layers, in the stored type."""
        if source.sharing is None:
            shard_of_units(source.config.num_kv_heads, shards)
            return {"shards": shards, "receivers": 0, "bytes": 0}
        itemsize = source.dtype("q_pool_pdh").itemsize
        return {
            "shards": shards,
            "receivers": int(source.sharing.crossing(shards).sum()),
            "bytes": crossing_parameters(source.config, source.sharing, shards) * itemsize,
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        config = result["config"]
        yield (
            f"{result['path']}: {config['num_layers']} layers, width {config['hidden_size']}, "
            f"{config['num_heads']} query and {config['num_kv_heads']} key/value heads of {config['head_dim']}, "
            f"vocabulary {config['vocab_size']}"
        )
        table = Table("parameter", "shape", "type")
        for name, parameter in result["parameters"].items():
            table.add_row(name, " x ".join(map(str, parameter["shape"])), parameter["dtype"])
        yield table
        yield ledger_table(result["ledger"])
        sharing, crossing = result["map"], result["shards"]
        yield from ["Dense: every unit keeps its own weights."] if sharing is None else _pairs(sharing)
        if crossing is not None:
            receivers = 0 if sharing is None else len(sharing["receivers"])
            yield (
                f"With heads cut over {crossing['shards']} chips, {crossing['receivers']} of {receivers} "
                f"receivers have their donor on another chip; {megabytes(crossing['bytes'])} of weights move in a pass."
            )
        if sharing is not None:
            yield NOT_SAVED


def _pairs(sharing: dict[str, Any]) -> Iterator[RenderableType]:
    """A map as plain data: who has whose weights."""
    receivers, dropped = sharing["receivers"], sharing.get("dropped", [])
    drops = f"{len(dropped)} dropped, " if dropped else ""
    yield f"Map: {len(receivers)} receivers, {drops}tie {sharing['tie']}, matched by {sharing['match']}"
    units = Table("unit (layer.unit)", "donor", "tie", "score")
    for entry in (*receivers, *dropped):
        donor, tie = "dropped", ""
        if "donor" in entry:
            donor, tie = "{}.{}".format(*entry["donor"]), entry.get("tie", sharing["tie"])
        score = "" if entry["score"] is None else f"{entry['score']:.4f}"
        units.add_row(f"{entry['layer']}.{entry['unit']}", donor, tie, score)
    yield units


def ledger_table(sizes: dict[str, Any]) -> Table:
    """A ledger's plain data as a table."""
    table = Table("part", title="stored parameters")
    for heading in ("dense", "stored", "saved"):
        table.add_column(heading, justify="right")
    attention = {"part": "attention", "dense": sizes["attention_dense"], "stored": sizes["attention_stored"]}
    for row in (*sizes["rows"], attention, {**sizes, "part": "all"}):
        if row is attention:
            table.add_section()
        saved = f"{1 - row['stored'] / row['dense']:.1%}" if row["stored"] != row["dense"] else ""
        table.add_row(row["part"], f"{row['dense']:,}", f"{row['stored']:,}", saved)
    table.add_section()
    table.add_row("bytes of parameters", megabytes(sizes["dense_bytes"]), megabytes(sizes["stored_bytes"]))
    for part, name in (("live on devices", "live_bytes"), ("files on disk", "disk_bytes")):
        if sizes[name] is not None:
            table.add_row(part, "", megabytes(sizes[name]))
    if sizes["nominal_saving"]:
        table.caption = (
            f"the map saves {sizes['nominal_saving']:,} parameters by its own count; "
            f"{sizes['actual_saving']:,} are saved in fact"
        )
    return table
