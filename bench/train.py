"""Training steps of dense, shared and aligned models, against transformers with PyTorch's AdamW.

Run from the repository root: python bench/train.py
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import child_result, cores, machine, peak_rss, report, seconds
from rich.table import Table

# Random weights of SmolLM2-135M's shape: what a step costs does not depend on the values.
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
TINY = SMOLLM2 | {"vocab_size": 512, "hidden_size": 72, "intermediate_size": 128, "num_hidden_layers": 4}
RATIO = 0.3
RIVAL, PLAIN = "transformers + torch AdamW", "headshare, dense"
CONTENDERS = {
    RIVAL: "torch",
    PLAIN: "dense",
    "headshare, tied, 30 % shared": "tied",
    "headshare, align, 30 % of pairs": "align",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time float32 training steps of SmolLM2-135M's shape."""

    batch: int = 4
    """Sequences."""
    seq_len: int = 512
    """Tokens of a sequence."""
    steps: int = 4
    """Timed steps of every contender in a round, after a first one that is not timed."""
    rounds: int = 4
    """Rounds of all contenders; the median of all their steps counts."""
    quick: bool = False
    """A tiny model instead, to test this benchmark; its figures mean nothing."""
    only: str | None = None
    """One contender in this process, its result printed as JSON: what this benchmark starts itself with."""
    json: Path | None = None
    """Where to write the result; bench/results/train.json by default."""


def run(options: Options) -> dict[str, Any]:
    """Every contender in a process of its own, so that none has another's memory; in turns."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, key in CONTENDERS.items():
            results[name].append(in_child(options, key))
    tokens = options.batch * options.seq_len
    rows = []
    for name, measured in results.items():
        took = float(np.median([value for one in measured for value in one["seconds"]]))
        rate = max(one["matmul_flops"] for ones in results.values() for one in ones)
        rows.append(
            {
                "name": name,
                "seconds": took,
                "tokens_per_second": tokens / took,
                "mfu": measured[0]["step_flops"] / took / rate,
                "peak_rss": max(one["peak_rss"] for one in measured),
                "matmul_gflops": rate / 1e9,
            }
        )
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        row["speedup"] = by_name[RIVAL]["seconds"] / row["seconds"]
        row["over_dense"] = row["seconds"] / by_name[PLAIN]["seconds"]
    return {
        "machine": machine("jax", "flax", "optax", "torch", "transformers"),
        "options": {key: value for key, value in asdict(options).items() if key not in ("json", "only")},
        "contenders": rows,
    }


def in_child(options: Options, key: str) -> dict[str, Any]:
    command = [__file__, "--only", key, "--batch", str(options.batch)]
    command += ["--seq-len", str(options.seq_len), "--steps", str(options.steps)]
    command += ["--quick"] if options.quick else []
    return child_result(*command)


def contender(options: Options) -> dict[str, Any]:
    """Times one contender's steps in this process."""
    shape = TINY if options.quick else SMOLLM2
    rng = np.random.default_rng(0)
    tokens = rng.integers(shape["vocab_size"], size=(options.batch, options.seq_len), dtype=np.int32)
    make = torch_step if options.only == "torch" else jax_step
    step = make(options, shape, tokens)
    step()
    took = [seconds(step) for _ in range(options.steps)]
    peak = peak_rss()

    from headshare_jax import LlamaConfig
    from headshare_jax.train.metrics import matrix_rate, step_flops

    config = LlamaConfig.from_hf(shape | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    return {
        "seconds": took,
        "peak_rss": peak,
        "step_flops": step_flops(config, options.seq_len, tokens.size),
        "matmul_flops": matrix_rate("float32"),
    }


def torch_step(options: Options, shape: dict[str, Any], tokens: np.ndarray) -> Callable[[], object]:
    """A float32 step of the dense model in PyTorch, on all cores."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(cores())
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))
    return torch_stepper(model, torch.from_numpy(tokens.astype(np.int64)))


def torch_stepper(model: Any, batch: Any, *, autocast: bool = False) -> Callable[[], object]:
    """The step as PyTorch users write it: transformers' loss, clipping, fused AdamW; `autocast` to bfloat16."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # A GPU has not finished before its loss is read.
        loss.item()

    return step


def jax_step(options: Options, shape: dict[str, Any], tokens: np.ndarray) -> Callable[[], object]:
    """A float32 step of the dense model, of the shared one, or with the penalty."""
    import jax

    from headshare_jax import Llama, LlamaConfig, match, share, sharing_map

    config = LlamaConfig.from_hf(shape | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    model = Llama.init(config, jax.random.key(0))
    # Tied training of the identity map is training of the dense model.
    sharing = sharing_map(match(model, "random"), 0.0 if options.only == "dense" else RATIO)
    if options.only == "tied":
        model = share(model, sharing)
    stage = {"kind": "align", "lm_weight": 1.0} if options.only == "align" else {"kind": "tied"}
    return jax_stepper(model, sharing, stage, tokens)


def jax_stepper(
    model: Any,
    sharing: Any,
    stage: dict[str, Any],
    tokens: np.ndarray,
    *,
    compute_dtype: str = "float32",
    sharding: Any = None,
) -> Callable[[], object]:
    """PostShare's own step, which takes over a float32 model's parameters; `sharding` places its state and batch."""
    import jax
    import jax.numpy as jnp

    from headshare_jax import parameters
    from headshare_jax.train.recipe import Data, Recipe, Sharing, Stage
    from headshare_jax.train.step import StageContext, first_state, make_step

    timed = Stage(**stage, steps=10**6, learning_rate=1e-5)
    recipe = Recipe(
        model="",
        data=Data(train="", seq_len=tokens.shape[1]),
        sharing=Sharing(ratio=RATIO),
        stages=(timed,),
        batch_size=len(tokens),
        compute_dtype=compute_dtype,
        remat="none",
    )
    context = StageContext(model.config, sharing, timed, recipe)
    names = parameters.parameter_names(model.config)
    state = first_state(context, {name: getattr(model, name)[...].astype(jnp.float32) for name in names})
    placed = jnp.asarray(tokens.astype(np.int32))[None]
    if sharding is not None:
        state, placed = jax.device_put((state, placed), sharding)
    step = make_step(context, state_sharding=None if sharding is None else jax.tree.map(lambda _: sharding, state))
    batch = (placed, jnp.ones_like(placed))

    def one_step() -> None:
        nonlocal state
        state, metrics = step(state, {}, {}, *batch)
        jax.block_until_ready((state, metrics))

    return one_step


def tables(result: dict[str, Any]) -> list[Table]:
    options = result["options"]
    table = Table(
        "",
        "seconds a step",
        "tokens/s",
        "against PyTorch",
        "against dense",
        "of the matrix rate",
        "peak RSS",
        title=f"training steps, {options['batch']} x {options['seq_len']} tokens, float32",
    )
    for row in result["contenders"]:
        table.add_row(
            row["name"],
            f"{row['seconds']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['over_dense']:.3f}x",
            f"{row['mfu']:.0%}",
            f"{row['peak_rss'] / 1e6:,.0f} MB",
        )
    return [table]


if __name__ == "__main__":
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, batch=2, seq_len=64, steps=2, rounds=1)
    if options.only:
        print(json.dumps(contender(options)))
    else:
        result = run(options)
        rate = result["contenders"][0]["matmul_gflops"]
        note = f"matrix rate measured beside it: {rate:.0f} GFLOP/s; peak RSS includes Python and libraries"
        report("train", result, tables(result), [note], options.json)
