"""Training steps of Llama-2-7B, ours beside MaxText's, compiled for absent chips and read by the same code.

MaxText needs Python 3.12 and an environment of its own, which bench/pods_maxtext.py says how to make. Run from the
repository root: python bench/pods.py --maxtext .venv-maxtext/bin/python
"""

import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tyro
from common import machine, report
from rich.table import Table

from headshare_jax.config import LlamaConfig
from headshare_jax.model.mesh import make_mesh
from headshare_jax.plan import estimate, planning
from headshare_jax.plan.costs import program_costs
from headshare_jax.plan.estimate import Layout, Workload
from headshare_jax.plan.program import needed_bytes
from headshare_jax.plan.topology import Chip, chip_of, topology_devices
from headshare_jax.presets import PRESETS

MODEL, RATIO = "llama-2-7b", 0.3
TINY = LlamaConfig(512, 256, 512, 2, 4, 4, 64)
# By our policy, the one of MaxText that keeps the same of a layer: nothing, the products, or these and attention too.
REMAT = {"full": "full", "dots": "minimal", "none": "minimal_with_context"}
PEER = "MaxText"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile steps in bfloat16 with float32 parameters and AdamW, one sequence a chip, fsdp over all chips."""

    maxtext: Path | None = None
    """A Python that has MaxText; without it, our steps alone."""
    topology: str = "v5e:16x16"
    """Chips."""
    length: int = 4096
    """Tokens of a sequence."""
    remat: tuple[str, ...] = tuple(REMAT)
    """What is kept of a layer for the backward pass, by our name."""
    quick: bool = False
    """A tiny model of ours on four chips instead, to test this benchmark; its figures mean nothing."""
    json: Path | None = None
    """Where to write the result; bench/results/pods.json by default."""


def run(options: Options) -> dict[str, Any]:
    chip, count = chip_of(options.topology)
    config = TINY if options.quick else PRESETS[MODEL]
    workload = Workload(config, planning.random_map(config, RATIO), "postshare", count, options.length)
    mesh = make_mesh((1, count, 1), topology_devices(options.topology))
    rows = []
    for remat in options.remat:
        layout = Layout((1, count, 1), remat)
        for name, shared in (("headshare, align", False), ("headshare, tied", True)):
            step = planning.measured(workload, layout, chip, mesh, shared=shared)
            rows.append({"name": name, "remat": remat, **step})
        if options.maxtext:
            rows.append({"name": PEER, "remat": remat, **peer(options, workload, layout, chip)})
    return {
        "machine": machine("jax", "libtpu"),
        "options": {key: value for key, value in asdict(options).items() if key not in ("json", "maxtext")},
        "steps": rows,
    }


def peer(options: Options, workload: Workload, layout: Layout, chip: Chip) -> dict[str, Any]:
    """What MaxText's step needs and costs on a chip."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.json"
        command = [str(options.maxtext), str(Path(__file__).with_name("pods_maxtext.py")), str(program)]
        settings = {
            "model_name": MODEL.replace("llama-2", "llama2"),
            "compile_topology": f"{chip.name}-{workload.batch}",
            "max_target_length": workload.length,
            "ici_fsdp_parallelism": workload.batch,
            "remat_policy": REMAT[layout.remat],
        }
        command += [f"{name}={value}" for name, value in settings.items()]
        # It writes down its whole configuration.
        log = Path(folder) / "log.txt"
        with log.open("w") as file:
            if subprocess.run(command, stdout=file, stderr=file, cwd=folder).returncode:
                raise SystemExit(f"{PEER} did not compile:\n{log.read_text()[-4000:]}")
        found = json.loads(program.read_text())
    costs = program_costs(found["text"])
    # Its attention is by the same kernels as ours, whose text does not tell what they compute.
    costs = replace(costs, flops=costs.flops + estimate.attention_flops(workload, layout))
    needed = needed_bytes(SimpleNamespace(**found["memory"]))
    speed = estimate.speed(workload, chip, costs)
    return {**estimate.fit(chip, needed), **speed, "compile_seconds": found["seconds"], "versions": found["versions"]}


def tables(result: dict[str, Any]) -> list[Table]:
    options = result["options"]
    table = Table(
        *("kept", "", "HBM a chip", "FLOPs", "HBM bytes", "sent", "compute", "memory", "network", "at least"),
        title=f"a training step on {options['topology']}, {options['length']} tokens a chip, by chip",
    )
    for row in result["steps"]:
        costs = ["refused"] + [""] * 6
        if row["flops"] is not None:
            costs = [f"{row['flops'] / 1e12:.1f} T", f"{row['hbm_bytes_accessed'] / 1e9:.0f} GB"]
            costs += [f"{sum(row['collective_bytes'].values()) / 1e9:.1f} GB"]
            costs += [f"{seconds:.3f} s" for seconds in (*row["seconds"].values(), row["step_seconds"])]
        table.add_row(row["remat"], row["name"], f"{row['needed_bytes'] / 1e9:.2f} GB", *costs)
    return [table]


if __name__ == "__main__":
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, topology="v5e:2x2", length=128, remat=("full",), maxtext=None)
    result = run(options)
    versions = [row["versions"] for row in result["steps"] if "versions" in row][:1]
    notes = [f"{PEER}'s: " + ", ".join(f"{key} {value}" for key, value in each.items()) for each in versions]
    report("pods", result, tables(result), notes, options.json)
