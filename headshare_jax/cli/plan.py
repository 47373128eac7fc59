"""`headshare plan`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import RenderableType
from rich.table import Table

from headshare_jax import convert
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command
from headshare_jax.config import LlamaConfig
from headshare_jax.convert import storage
from headshare_jax.convert.huggingface import read_json
from headshare_jax.errors import HeadshareError
from headshare_jax.methods.slimming import even_map
from headshare_jax.model.layer import REMAT_POLICIES
from headshare_jax.plan import planning
from headshare_jax.plan.estimate import STAGES, Workload
from headshare_jax.plan.topology import EXAMPLES, chip_of
from headshare_jax.presets import PRESETS
from headshare_jax.report.progress import say
from headshare_jax.sharing.map import SharingMap

_MEMORY = {
    "parameters": "parameter_bytes",
    "optimizer": "optimizer_bytes",
    "key/value cache": "cache_bytes",
    "activations kept": "activation_bytes",
    "other temporaries": "other_bytes",
    "needed in all": "needed_bytes",
    "room left": "room_bytes",
}


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """Compile a step for a TPU pod without one: does it fit, what does it cost, what bounds it; dense and shared.

    Example: headshare plan llama-2-7b --topology v5e:2x2 --devices 1 --stage decode --ratio 0.3
    """

    src: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="SRC",
            help=f"{', '.join(PRESETS)}; a config.json or a folder that holds one; or a model as of all commands.",
        ),
    ]
    topology: Annotated[kinds.Topology, tyro.conf.arg(help=f"Chips, such as {EXAMPLES}.")]
    devices: Annotated[kinds.Count | None, tyro.conf.arg(help="Use so many of the chips; all by default.")] = None
    stage: Annotated[
        kinds.Stage,
        tyro.conf.arg(
            help=f"{', '.join(STAGES)}. Decode adds a token to each sequence; of postshare, `dense` is the align step "
            "and `shared` the tied one; run adds what a run does outside its steps."
        ),
    ] = "postshare"
    ratio: Annotated[
        kinds.Ratio | None,
        tyro.conf.arg(help="Sharing ratio; by default the model's own map, if it has one, else 0.3."),
    ] = None
    budget: Annotated[
        kinds.Budget | None,
        tyro.conf.arg(help="Instead of a ratio: slim units, all alike, that keep this part of attention's parameters."),
    ] = None
    tie: Annotated[
        kinds.Tie | None,
        tyro.conf.arg(help="Projections to share: some of q, k, v, o, in that order; qkv where there is no map."),
    ] = None
    batch: Annotated[
        kinds.Count | None,
        tyro.conf.arg(help="Sequences, over all chips; one a chip in postshare, else one by default."),
    ] = None
    length: Annotated[kinds.Count, tyro.conf.arg(help="Tokens of a sequence; in decode, slots of the cache.")] = 4096
    mesh: Annotated[
        tuple[kinds.MeshSize, kinds.MeshSize, kinds.MeshSize] | None,
        tyro.conf.arg(
            metavar="DATA FSDP TENSOR", help="Sizes of the mesh, one of which may be -1; by default one that fits."
        ),
    ] = None
    remat: Annotated[
        kinds.Remat | None, tyro.conf.arg(help=f"In postshare: {', '.join(REMAT_POLICIES)}; by default one that fits.")
    ] = None
    host: Annotated[
        bool, tyro.conf.arg(help="Estimate from the shapes alone; compiles nothing, and needs no libtpu.")
    ] = False

    def run(self) -> dict[str, Any]:
        _, count = chip_of(self.topology)
        config, sharing = _opened(self.src)
        if self.budget is not None:
            if self.ratio is not None or self.tie:
                raise HeadshareError(
                    "Slim units share nothing; give a budget, or a ratio and a tie.", option=("budget", "ratio", "tie")
                )
            sharing = even_map(config, self.budget)
        elif sharing is None or self.ratio is not None:
            ratio = 0.3 if self.ratio is None else self.ratio
            sharing = planning.random_map(config, ratio, self.tie or "qkv")
        elif self.tie:
            raise HeadshareError(
                "The model's own map says what it shares; give a ratio too, or leave the tie out.",
                option=("ratio", "tie"),
            )
        batch = (self.devices or count) if self.stage in ("postshare", "run") else 1
        workload = Workload(config, sharing, self.stage, batch if self.batch is None else self.batch, self.length)
        say("estimating" if self.host else "compiling, for a minute or several")
        planned = planning.plan(
            workload, self.topology, devices=self.devices, mesh=self.mesh, remat=self.remat, host=self.host
        )
        return {"model": self.src, "budget": sharing.budget, **planned}

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        how = "compiled for" if result["compiled"] else "estimated, not compiled, for"
        data, fsdp, tensor = result["mesh"]
        remat = f", remat {result['remat']}" if result["stage"] in ("postshare", "run") else ""
        yield (
            f"{result['model']}, {result['stage']}, {result['batch']} x {result['length']} tokens, {how} "
            f"{result['devices']} of {result['topology']}: mesh data {data}, fsdp {fsdp}, tensor {tensor}{remat}"
        )
        models = [result[name] | {"sent": result[name]["collective_bytes"] or {}} for name in ("dense", "shared")]
        for model in models:
            if model["temporary_bytes"] is not None:
                model["other_bytes"] = max(model["temporary_bytes"] - model["activation_bytes"], 0)
        table = Table("a chip", "dense", "shared" if result["budget"] is None else "smaller")

        def row(heading: str, amounts: Iterable[float | None], unit: str = "") -> None:
            table.add_row(heading, *(_amount(amount, unit) for amount in amounts))

        for heading, name in _MEMORY.items():
            if any(model.get(name) for model in models):
                row(heading, (model.get(name) for model in models), "B")
        table.add_row("fits", *("yes" if model["fits"] else "no" for model in models))
        table.add_section()
        estimated = result["compiled"] and any(model["costs_estimated"] for model in models)
        row("a step, estimated: FLOPs" if estimated else "a step: FLOPs", (model["flops"] for model in models))
        row("HBM bytes", (model["hbm_bytes_accessed"] for model in models), "B")
        for kind in dict.fromkeys(kind for model in models for kind in model["sent"]):
            row(f"sent: {kind}", (model["sent"].get(kind) for model in models), "B")
        row("at least", (model["step_seconds"] for model in models), "s")
        table.add_row("bound by", *(model["bound_by"] or "" for model in models))
        row("tokens/s, all chips", (model["tokens_per_second"] for model in models))
        if result["compiled"]:
            row("compiling took", (model["compile_seconds"] for model in models), "s")
        yield table
        if "programs" in result:
            yield from _outside(result)
        for other in result["tried"][:-1]:
            yield f"tried before: mesh {' x '.join(map(str, other['mesh']))}, remat {other['remat']}: does not fit"


def _outside(result: dict[str, Any]) -> Iterator[RenderableType]:
    """Tables of what a run does outside its steps, and of a host's memory."""
    table = Table("outside the steps, a chip", "held", "needed in all", "room left", "fits")
    for row in result["programs"]:
        amounts = (_amount(row[name], "B") for name in ("beside_bytes", "needed_bytes", "room_bytes"))
        table.add_row(row["name"], *amounts, "yes" if row["fits"] else "no")
    yield table
    table = Table("memory of a host, by arithmetic", "")
    for name, amount in result["host_bytes"].items():
        table.add_row(name, _amount(amount, "B"))
    yield table


def _opened(src: str) -> tuple[LlamaConfig, SharingMap | None]:
    """The architecture that a name stands for, and its sharing map, if it has one."""
    if src in PRESETS:
        return PRESETS[src], None
    path = storage.path(src)
    file = path if path.suffix == ".json" else path / "config.json"
    if file.is_file() and not any(path.glob("*.safetensors")):
        return LlamaConfig.from_hf(read_json(file)), None
    try:
        source = convert.open_checkpoint(path)
    except HeadshareError as error:
        if path.exists() or "/" in src:
            raise
        raise HeadshareError(f"{src} is neither a model nor one of {', '.join(PRESETS)}.") from error
    return source.config, source.sharing


def _amount(value: float | None, unit: str) -> str:
    """A number with a decimal prefix and three digits."""
    if value is None:
        return "unknown"
    prefixes = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1.0: "", 1e-3: "m", 1e-6: "u"}
    for scale, prefix in prefixes.items():
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"0 {unit}"
