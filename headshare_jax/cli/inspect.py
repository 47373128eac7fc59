"""`headshare inspect`."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import RenderableType
from rich.table import Table

from headshare_jax import convert, parameters
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command, Overwrite, Source
from headshare_jax.convert import stored
from headshare_jax.convert.atomic import check_output, new_file
from headshare_jax.convert.card import post_trained
from headshare_jax.errors import HeadshareError
from headshare_jax.report.map import draw_map
from headshare_jax.report.picture import check_name
from headshare_jax.report.progress import progress
from headshare_jax.resources import megabytes
from headshare_jax.sharing.budget import crossing_parameters
from headshare_jax.sharing.ledger import NOT_SAVED, ledger, short
from headshare_jax.sharing.map import shard_of_units
from headshare_jax.sharing.running import running
from headshare_jax.sharing.source import stored_shape


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """Show what a model is, what it stores, and what became of its heads.

    Example: headshare inspect smollm2-shared

    Attributes:
      check: Read all of it, and compare it with its checksums if it carries any.
      plot: Where to draw who shares with whom (.png, .svg or .pdf).
      pairs: List every unit that shares or is dropped.
      shapes: List every parameter's shape and type.
      shards: Count what must move if so many chips share out the heads of each layer evenly.
      context: Tokens of a text, for the costs of running the model.
      batch: Texts at a time, likewise.
    """

    needs: ClassVar = {"overwrite": ("plot",)}

    src: Source
    check: bool = False
    plot: Path | None = None
    pairs: bool = False
    shapes: bool = False
    shards: kinds.Count | None = None
    context: kinds.Count = 4096
    batch: kinds.Count = 1
    overwrite: Overwrite = False

    def run(self) -> dict[str, Any]:
        if self.plot is not None:
            check_name(self.plot)
            check_output(self.plot, folder=False, overwrite=self.overwrite)
        path = convert.locate(self.src)
        source = convert.open_checkpoint(path)
        config, sharing = source.config, source.sharing
        if self.plot is not None and sharing is None:
            raise HeadshareError(f"{self.src} is dense: there is no map to draw.", option="plot")
        checked = self._checked(path) if self.check else None
        if self.plot is not None and sharing is not None:
            with new_file(self.plot, overwrite=self.overwrite) as file:
                draw_map(sharing).save(file)
        return {
            "path": str(path),
            "format": stored.format_of(source),
            "family": config.family,
            "config": config.to_json(),
            "parameters": {
                name: {"shape": stored_shape(config, name, sharing), "dtype": str(source.dtype(name))}
                for name in parameters.parameter_names(config)
            },
            "stored_types": stored.types(source),
            "map": None if sharing is None else json.loads(sharing.to_json()),
            "summary": None if sharing is None else sharing.summary(),
            "ledger": ledger(source, path=source.path).to_json(),
            "running": running(config, sharing, context=self.context, batch=self.batch).to_json(),
            "provenance": stored.provenance(source),
            "checksums": stored.has_checksums(source),
            "checked": checked,
            "plot": self.plot and str(self.plot),
            "shards": None if self.shards is None else self._crossing(source, self.shards),
        }

    def _checked(self, path: Path) -> dict[str, Any]:
        with progress("reading all of it") as step:
            return asdict(convert.verify(path, progress=step))

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
        yield from _summary(result)
        if result["checked"] is not None:
            yield _check(result["checked"])
        if result["plot"] is not None:
            yield f"written: {result['plot']}"
        sharing, crossing = result["map"], result["shards"]
        if crossing is not None:
            receivers = 0 if sharing is None else len(sharing["receivers"])
            yield (
                f"With heads cut over {crossing['shards']} chips, {crossing['receivers']} of {receivers} "
                f"receivers have their donor on another chip; {megabytes(crossing['bytes'])} of weights move in a pass."
            )
        yield ledger_table(result["ledger"])
        yield running_table(result["running"])
        if sharing is not None:
            yield NOT_SAVED
        if self.shapes:
            table = Table("parameter", "shape", "type")
            for name, parameter in result["parameters"].items():
                table.add_row(name, " x ".join(map(str, parameter["shape"])), parameter["dtype"])
            yield table
        if self.pairs and sharing is not None:
            yield _pairs(sharing)


def _summary(result: dict[str, Any]) -> Iterator[str]:
    """The model in a few lines."""
    config, sizes, sharing = result["config"], result["ledger"], result["map"]
    units = config["num_layers"] * config["num_kv_heads"]
    yield f"{result['path']}: {result['format']}, family {result['family']}"
    yield (
        f"{config['num_layers']} layers, width {config['hidden_size']}, {config['num_heads']} query and "
        f"{config['num_kv_heads']} key/value heads of {config['head_dim']}, vocabulary {config['vocab_size']}, context "
        f"{config['max_position_embeddings']}"
    )
    bits = 8 * sizes["disk_bytes"] / max(sizes["stored"], 1)
    types = ", ".join(f"{name} ({short(count)})" for name, count in result["stored_types"].items())
    read = {parameter["dtype"] for parameter in result["parameters"].values()}
    as_read = "" if read >= result["stored_types"].keys() else f", read as {' and '.join(sorted(read))}"
    yield (
        f"{short(sizes['stored'])} parameters stored as {types}{as_read}; {megabytes(sizes['disk_bytes'])} on disk, "
        f"{bits:.1f} bits for each"
    )
    if sharing is None:
        yield f"Dense: each of {units} units (a key/value head and its query heads) keeps its own weights."
    else:
        matched = "" if sharing["match"] is None else f", matched by {sharing['match']}"
        yield f"Map: {result['summary']}{matched}{_method(sharing)} (--pairs lists them)"
    if trained := post_trained(result["provenance"]):
        yield f"{trained}, after the map was made"
    if told := _told(result["provenance"]):
        yield f"Made from: {told}"
    yield "Checksums: " + ("of every stored chunk (--check reads all)" if result["checksums"] else "none")


def _method(sharing: dict[str, Any]) -> str:
    return f", chosen by the method {sharing['method']}" if sharing.get("method") else ""


def _told(provenance: dict[str, Any], most: int = 200) -> str:
    """What a checkpoint was made from, as far as it fits into a line."""
    told = ", ".join(
        f"{name} {value}" for name, value in provenance.items() if isinstance(value, (str, int, float)) and value != ""
    )
    return told if len(told) <= most else f"{told[:most]} ..."


def _check(checked: dict[str, Any]) -> str:
    read = f"{checked['files']} files, {checked['chunks']} pieces, {megabytes(checked['bytes'])} read"
    if checked["checksums"]:
        return f"Checked: {read}; all are as they were written."
    return (
        f"Checked: {read}, and all can be used; without checksums, damaged values that are still numbers go unnoticed."
    )


def _pairs(sharing: dict[str, Any]) -> Table:
    """A map as plain data: who has whose weights, and what is kept of slim units."""
    units = Table("unit (layer.unit)", "donor", "tie or width", "score")
    for entry in (*sharing["receivers"], *sharing.get("dropped", []), *sharing.get("slim", [])):
        donor, tie = "dropped", ""
        if "rank" in entry or "pairs" in entry:
            donor, tie = "slim", _kept(entry, sharing["model"])
        if "donor" in entry:
            donor, tie = "{}.{}".format(*entry["donor"]), entry.get("tie", sharing["tie"])
        score = "" if entry["score"] is None else f"{entry['score']:.4f}"
        units.add_row(f"{entry['layer']}.{entry['unit']}", donor, tie, score)
    return units


def _kept(entry: dict[str, Any], model: dict[str, Any]) -> str:
    """What is kept of a slim unit, such as `40 of 64 values, 21 of 32 pairs`."""
    head_dim, pairs = model["head_dim"], model["head_dim"] - model["rotary_dim"] // 2
    kept = len(entry["pairs"]) if "pairs" in entry else pairs
    return f"{entry.get('rank', head_dim)} of {head_dim} values, {kept} of {pairs} pairs"


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


def running_table(costs: dict[str, Any]) -> Table:
    """The plain data of `Running` as a table."""
    dense, model, padding = costs["dense"], costs["model"], costs["padding"]
    texts = "a text" if costs["batch"] == 1 else f"{costs['batch']} texts"
    table = Table("cost of a token", title=f"generating with {texts} of {costs['context']:,} tokens, in 16 bits")
    for heading in ("dense", "now", "saved"):
        table.add_column(heading, justify="right")
    rows = (
        ("key/value cache, all texts", "cache_bytes"),
        ("FLOPs: q, k, v, o", "projections"),
        ("FLOPs: attention", "attention"),
        ("FLOPs: MLPs, head", "rest"),
        ("FLOPs", "flops"),
    )
    for part, name in rows:
        count = megabytes if name == "cache_bytes" else short
        saved = f"{1 - model[name] / dense[name]:.1%}" if model[name] != dense[name] else ""
        table.add_row(part, count(dense[name]), count(model[name]), saved)
    if padding["cache_bytes"]:
        table.caption = (
            f"{megabytes(padding['cache_bytes'])} of cache and {short(padding['flops'])} FLOPs are padding: all heads "
            "of a layer run as wide as its widest"
        )
    return table
