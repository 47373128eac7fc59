"""Decoding, prompts and training steps on one GPU, in bfloat16 on random weights, against transformers.

Run from the repository root, with JAX and PyTorch builds for the GPU: python bench/gpu.py
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import child_result, machine, report, seconds
from rich.table import Table

from headshare_jax.presets import PRESETS
from train import RATIO, SMOLLM2, TINY, jax_stepper, torch_stepper

SHAPES = {"llama-2-7b": PRESETS["llama-2-7b"].to_hf(), "smollm2-135m": SMOLLM2, "tiny": TINY}
# A 7B model's optimizer takes more than one GPU has.
TRAINED = ("smollm2-135m", "tiny")
RIVAL = "transformers"
CONTENDERS = {RIVAL: "torch", "headshare, dense": "dense", "headshare, 30 % shared": "shared"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time greedy decoding, prompts and training steps in bfloat16."""

    shapes: tuple[str, ...] = ("llama-2-7b", "smollm2-135m")
    """Of llama-2-7b, smollm2-135m and tiny."""
    batches: tuple[int, ...] = (1, 4, 32)
    """Rows decoded together, after prompts of 64 tokens."""
    new_tokens: int = 64
    """Tokens decoded of each."""
    prompts: tuple[int, int] = (8, 512)
    """Prompts that are read together, and tokens of each."""
    steps: tuple[tuple[int, int], ...] = ((16, 1024), (4, 4096))
    """Sequences and tokens of each of a training step, where the shape is small enough to train on one GPU."""
    repeats: int = 3
    """Timed repetitions, after a first one that is not timed; the best counts."""
    quick: bool = False
    """A tiny model, to test this benchmark anywhere; its figures mean nothing."""
    only: str | None = None
    """One contender in this process, its result printed as JSON: what this benchmark starts itself with."""
    json: Path | None = None
    """Where to write the result; bench/results/gpu.json by default."""


def run(options: Options) -> dict[str, Any]:
    """Every contender and shape in a process of its own."""
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        for name, kind in CONTENDERS.items():
            rows.append({"shape": shape, "name": name, **in_child(options, kind, shape)})
    for row in rows:
        rival = next(each for each in rows if each["shape"] == row["shape"] and each["name"] == RIVAL)
        row["speedup"] = {
            stage: rate / rival["tokens_per_second"][stage] for stage, rate in row["tokens_per_second"].items()
        }
    told = {key: value for key, value in asdict(options).items() if key not in ("json", "only")}
    return {
        "machine": machine("jax", "flax", "torch", "transformers"),
        "gpu": rows[0]["gpu"],
        "options": told,
        "rows": rows,
    }


def in_child(options: Options, kind: str, shape: str) -> dict[str, Any]:
    numbers = [*options.batches, "--prompts", *options.prompts, "--new-tokens", options.new_tokens]
    numbers += ["--repeats", options.repeats, "--steps", *(size for step in options.steps for size in step)]
    command = [__file__, "--only", f"{kind}:{shape}", "--batches", *map(str, numbers)]
    return child_result(*command, XLA_PYTHON_CLIENT_PREALLOCATE="false")


def contender(options: Options) -> dict[str, Any]:
    """Tokens/s of one contender at every stage."""
    assert options.only is not None
    kind, shape = options.only.split(":")
    make = TorchModel if kind == "torch" else JaxModel
    model = make(SHAPES[shape], shared=kind == "shared")
    rng = np.random.default_rng(0)

    def tokens(rows: int, length: int) -> np.ndarray:
        return rng.integers(SHAPES[shape]["vocab_size"], size=(rows, length), dtype=np.int64)

    def rate(count: int, once: Callable[[], object]) -> float:
        once()
        return count / min(seconds(once) for _ in range(options.repeats))

    rates, new, (rows, length) = {}, options.new_tokens, options.prompts
    for batch in options.batches:
        few = tokens(batch, 64)
        rates[f"decode {batch}"] = rate(batch * new, lambda few=few: model.generate(few, new))
    many = tokens(rows, length)
    rates[f"prompts {rows} x {length}"] = rate(rows * length, lambda: model.generate(many, 1))
    for rows, length in options.steps if shape in TRAINED else ():
        step = model.trained(tokens(rows, length))
        rates[f"train {rows} x {length}"] = rate(rows * length, step)
        del step
    return {"tokens_per_second": rates, "gpu": model.device}


class TorchModel:
    """As PyTorch users write it: sdpa; training under autocast, with fused AdamW."""

    def __init__(self, shape: dict[str, Any], *, shared: bool):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        assert not shared
        self.torch = torch
        self.place = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.cuda.get_device_name() if self.place == "cuda" else "none"
        self.config = LlamaConfig(**shape, attn_implementation="sdpa")
        self.make = LlamaForCausalLM
        with torch.device(self.place):
            self.model = LlamaForCausalLM(self.config).to(torch.bfloat16).eval()

    def generate(self, tokens: np.ndarray, new: int) -> None:
        with self.torch.inference_mode():
            prompt = self.torch.from_numpy(tokens).to(self.place)
            self.model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0).cpu()

    def trained(self, tokens: np.ndarray) -> Callable[[], object]:
        with self.torch.device(self.place):
            model = self.make(self.config)
        return torch_stepper(model, self.torch.from_numpy(tokens).to(self.place), autocast=True)


class JaxModel:
    """The package's own generation and training step."""

    def __init__(self, shape: dict[str, Any], *, shared: bool):
        import jax

        from headshare_jax import Llama, LlamaConfig, share
        from headshare_jax.plan.planning import random_map

        self.device = jax.devices()[0].device_kind
        self.config = LlamaConfig.from_hf(shape | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
        self.sharing = random_map(self.config, RATIO if shared else 0.0)
        self.model = Llama.init(self.config, jax.random.key(0), dtype="bfloat16", compute_dtype="bfloat16")
        if shared:
            self.model = share(self.model, self.sharing)

    def generate(self, tokens: np.ndarray, new: int) -> None:
        from headshare_jax import generate

        generate(self.model, tokens.tolist(), max_new_tokens=new, stop_tokens=())

    def trained(self, tokens: np.ndarray) -> Callable[[], object]:
        """A tied step: of the dense model, whose map is the identity, or of the shared one."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        from headshare_jax.model.mesh import make_mesh

        # A mesh, of one device too, says which attention kernel there is.
        whole = NamedSharding(make_mesh((1, 1, 1), jax.devices()[:1]), PartitionSpec())
        return jax_stepper(self.model, self.sharing, {"kind": "tied"}, tokens, compute_dtype="bfloat16", sharding=whole)


def tables(result: dict[str, Any]) -> list[Table]:
    made = []
    for shape in result["options"]["shapes"]:
        rows = [row for row in result["rows"] if row["shape"] == shape]
        stages = list(rows[0]["tokens_per_second"])
        table = Table("tokens/s", *stages, title=f"{shape}, bfloat16, {result['gpu']}")
        for row in rows:
            rates = (f"{row['tokens_per_second'][s]:,.0f} ({row['speedup'][s]:.2f}x)" for s in stages)
            table.add_row(row["name"], *rates)
        made.append(table)
    return made


if __name__ == "__main__":
    options = tyro.cli(Options)
    if options.quick:
        small = {"batches": (1,), "new_tokens": 4, "prompts": (2, 64), "steps": ((2, 64),), "repeats": 1}
        options = replace(options, shapes=("tiny",), **small)
    if options.only:
        print(json.dumps(contender(options)))
    else:
        result = run(options)
        report("gpu", result, tables(result), [], options.json)
