"""Prompts, tokens and memory of a model being served, dense and shared, against transformers.

Run from the repository root: python bench/serve.py [SRC]
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from common import RESULTS, child_result, cores, machine, peak_rss, report, seconds
from rich.table import Table

RATIO = 0.3
RIVAL, COMPILED, DENSE, SHARED = "transformers", "transformers, torch.compile", "headshare, dense", "headshare, shared"
# Contender: what runs it, and the model that it reads.
CONTENDERS = {
    RIVAL: ("torch", "hf"),
    COMPILED: ("compiled", "hf"),
    DENSE: ("jax", "dense"),
    SHARED: ("jax", "shared"),
}
# Where memory alone is measured, blocks of this many bytes go back to the system when they are freed; else glibc keeps
# more or fewer of them by chance, which is as much as sharing saves. It costs time, so speed is measured without.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
FIND_DEFAULT = "from headshare_jax.cli.demo import smollm2; print(smollm2())"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time prompts (a batch) and greedy decoding (one row) in float32, and measure memory and first tokens."""

    src: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[SRC]")] = None
    """A .gguf file or a Hugging Face folder; SmolLM2-135M-Instruct by default, fetched as `headshare demo` does."""
    batch: int = 8
    """Prompts that are read together."""
    prompt: int = 512
    """Tokens of each."""
    new_tokens: int = 64
    """Tokens decoded, after a prompt of 64 tokens."""
    repeats: int = 3
    """Timed repetitions in a round, after a first one that is not timed."""
    rounds: int = 2
    """Rounds of all contenders; the best of all repetitions counts."""
    memory_rounds: int = 6
    """Rounds in which the dense and the shared model only load and decode once; the smallest peak of each counts."""
    quick: bool = False
    """Short prompts once, to test this benchmark; its figures mean nothing."""
    only: str | None = None
    """One contender in this process, its result printed as JSON: what this benchmark starts itself with."""
    memory: bool = False
    """Of that contender measure memory alone."""
    json: Path | None = None
    """Where to write the result; bench/results/serve.json by default."""


def run(options: Options) -> dict[str, Any]:
    """Every contender in processes of its own, in turns."""
    src = options.src or Path(output_of("-c", FIND_DEFAULT).strip())
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
        models = {name: Path(folder) / name for name in ("dense", "shared", "hf")}
        headshare("convert", src, models["dense"], "--to", "native")
        headshare("convert", src, models["hf"], "--to", "hf")
        headshare("share", src, models["shared"], "--ratio", str(RATIO), "--method", "direct", "--no-eval")
        measured = timed(options, models, Path(folder) / "cache")
        peaks = memory(options, models, Path(folder) / "cache")
        first = first_tokens(options, {name: models[name] for name in ("dense", "shared")}, Path(folder))
    rows = {name: summary(options, ones) for name, ones in measured.items() if ones}
    rate = max(one["matmul_flops"] for ones in measured.values() for one in ones)
    for row in rows.values():
        for stage in ("prefill", "decode"):
            row[f"{stage}_speedup"] = rows[RIVAL][f"{stage}_seconds"] / row[f"{stage}_seconds"]
        row["of_matrix_rate"] = row["prefill_flops"] / row["prefill_seconds"] / rate
        row["of_matrix_rate_needed"] = row["prefill_flops_needed"] / row["prefill_seconds"] / rate
    saved = rows[DENSE]["stored_bytes"] - rows[SHARED]["stored_bytes"]
    rss_saved = min(peaks[DENSE]) - min(peaks[SHARED])
    told = {key: value for key, value in asdict(options).items() if key not in ("json", "only", "memory", "src")}
    return {
        "machine": machine("jax", "flax", "torch", "transformers"),
        "options": told,
        "source": src.name,
        "matmul_gflops": rate / 1e9,
        "contenders": rows,
        "first_token_seconds": first,
        "memory": {
            "peak_rss": peaks,
            "bytes_saved": saved,
            "rss_saved": rss_saved,
            "fraction": rss_saved / saved,
        },
    }


def timed(options: Options, models: dict[str, Path], cache: Path) -> dict[str, list[dict[str, Any]]]:
    """What every contender measures in each round; nothing of torch.compile where it does not work."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, (kind, model) in CONTENDERS.items():
            if options.quick and kind == "compiled":
                continue
            try:
                measured[name].append(in_child(options, kind, models[model], cache))
            except subprocess.CalledProcessError:
                if kind != "compiled":
                    raise
    return measured


def memory(options: Options, models: dict[str, Path], cache: Path) -> dict[str, list[int]]:
    """Peak RSS of loading and decoding once, in a process of its own each time."""
    peaks: dict[str, list[int]] = {DENSE: [], SHARED: []}
    for _ in range(options.memory_rounds):
        for name, sizes in peaks.items():
            kind, model = CONTENDERS[name]
            sizes.append(in_child(options, kind, models[model], cache, "--memory", **MALLOC)["serving_rss"])
    return peaks


def summary(options: Options, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The best times and the smallest peaks of a contender's rounds."""
    prefill = min(min(one["prefill"]) for one in measured)
    decode = min(min(one["decode"]) for one in measured)
    return {
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": options.batch * options.prompt / prefill,
        "prefill_flops": measured[0]["prefill_flops"],
        "prefill_flops_needed": measured[0]["prefill_flops_needed"],
        "decode_seconds": decode,
        "decode_tokens_per_second": options.new_tokens / decode,
        "serving_rss": min(one["serving_rss"] for one in measured),
        "stored_bytes": measured[0]["stored_bytes"],
    }


def headshare(*arguments: object, **environment: str) -> None:
    command = [sys.executable, "-m", "headshare_jax", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | environment)


def output_of(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def in_child(options: Options, kind: str, model: Path, cache: Path, *more: str, **environment: str) -> dict[str, Any]:
    """One contender's figures; from its second round on, what it compiled in the first is in the cache."""
    command = [__file__, str(model), "--only", kind, "--repeats", str(options.repeats), *more]
    command += ["--batch", str(options.batch), "--prompt", str(options.prompt), "--new-tokens", str(options.new_tokens)]
    return child_result(*command, HEADSHARE_CACHE=str(cache), **environment)


def first_tokens(options: Options, models: dict[str, Path], cache: Path) -> dict[str, float]:
    """Wall time of `headshare generate` for one token, imports and loading included: compiling, and compiled before."""

    def generate(model: Path) -> None:
        arguments = ("generate", model, "--prompt", "The capital of France is", "--max-new-tokens", "1")
        headshare(*arguments, HEADSHARE_CACHE=str(cache))

    took = {"not compiled before": seconds(lambda: generate(models["dense"]))}
    for name, model in models.items():
        if not options.quick:
            generate(model)
        took[name] = min(seconds(lambda model=model: generate(model)) for _ in range(options.repeats))
    return took


def contender(options: Options) -> dict[str, Any]:
    """Times one contender in this process; memory first, since a batch of prompts takes more than serving one."""
    assert options.src is not None
    prefill, decode, stored_bytes = (jax_model if options.only == "jax" else torch_model)(options)
    decode()
    serving_rss = peak_rss()
    if options.memory:
        return {"serving_rss": serving_rss}
    decoded = [seconds(decode) for _ in range(options.repeats)]
    prefill()
    result = {
        "decode": decoded,
        "prefill": [seconds(prefill) for _ in range(options.repeats)],
        "serving_rss": serving_rss,
        "stored_bytes": stored_bytes,
    }
    from headshare_jax import convert
    from headshare_jax.train.metrics import matrix_rate, step_flops

    # A third of a step's products is its forward pass; only the last position goes through the head.
    config = convert.open_checkpoint(options.src).config
    tokens = options.batch * options.prompt
    head = 2.0 * config.hidden_size * config.vocab_size
    flops = step_flops(config, options.prompt, tokens) / 3 - head * (tokens - options.batch)
    layer = (flops - head * options.batch) / config.num_layers
    keys_values = 4.0 * config.hidden_size * config.head_dim * config.num_kv_heads * tokens
    return result | {
        "prefill_flops": flops,
        # Of the last layer the tokens before the last need keys and values alone.
        "prefill_flops_needed": flops - layer + keys_values,
        "matmul_flops": matrix_rate("float32"),
    }


Run = Callable[[], object]


def prompts(options: Options, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    many = rng.integers(vocabulary, size=(options.batch, options.prompt), dtype=np.int64)
    return many, rng.integers(vocabulary, size=(1, 64), dtype=np.int64)


def torch_model(options: Options) -> tuple[Run, Run, int]:
    """As PyTorch users write it: sdpa, logits of the last position only, all cores."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(cores())
    model = AutoModelForCausalLM.from_pretrained(options.src, dtype=torch.float32, attn_implementation="sdpa").eval()
    many, one = (torch.from_numpy(tokens) for tokens in prompts(options, model.config.vocab_size))
    if options.only == "compiled":
        model.forward = torch.compile(model.forward)
    new = options.new_tokens

    def prefill() -> None:
        with torch.inference_mode():
            model(many, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        with torch.inference_mode():
            model.generate(one, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    stored = sum(parameter.nbytes for parameter in model.parameters())
    return prefill, decode, stored


def jax_model(options: Options) -> tuple[Run, Run, int]:
    """The command's own path from a native checkpoint to tokens, with its cache of compiled programs."""
    from headshare_jax import generate, load
    from headshare_jax.cli.compiled import keep_compiled_programs
    from headshare_jax.sharing.ledger import ledger

    keep_compiled_programs()
    model = load(options.src)
    many, one = (tokens.tolist() for tokens in prompts(options, model.config.vocab_size))
    return (
        lambda: generate(model, many, max_new_tokens=1, stop_tokens=()),
        lambda: generate(model, one, max_new_tokens=options.new_tokens, stop_tokens=()),
        ledger(model).stored_bytes,
    )


def tables(result: dict[str, Any]) -> list[Table]:
    options = result["options"]
    table = Table(
        "",
        f"prompts, {options['batch']} x {options['prompt']}: tokens/s",
        "against transformers",
        "the model's products, of the matrix rate",
        "those that are needed",
        f"decoding, {options['new_tokens']} tokens: tokens/s",
        "against transformers",
        "peak RSS of decoding",
        title=f"serving {result['source']}, float32",
    )
    for name, row in result["contenders"].items():
        table.add_row(
            name,
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['prefill_speedup']:.2f}x",
            f"{row['of_matrix_rate']:.1%}",
            f"{row['of_matrix_rate_needed']:.1%}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_speedup']:.2f}x",
            f"{row['serving_rss'] / 1e6:,.0f} MB",
        )
    first = Table("`headshare generate`, one token", "seconds", title="first token, imports and loading included")
    for name, took in result["first_token_seconds"].items():
        first.add_row(name, f"{took:.2f}")
    return [table, first]


def notes(result: dict[str, Any]) -> list[str]:
    memory = result["memory"]
    stored, resident = memory["bytes_saved"] / 1e6, memory["rss_saved"] / 1e6
    rounds = result["options"]["memory_rounds"]
    return [
        f"matrix rate measured beside it: {result['matmul_gflops']:.0f} GFLOP/s",
        f"sharing stores {stored:.1f} MB less; peak RSS, the least of {rounds} processes, falls by {resident:.1f} MB",
    ]


if __name__ == "__main__":
    options = tyro.cli(Options)
    if options.quick:
        options = replace(options, batch=2, prompt=64, new_tokens=4, repeats=1, rounds=1, memory_rounds=1)
    if options.only:
        print(json.dumps(contender(options)))
    else:
        result = run(options)
        report("serve", result, tables(result), notes(result), options.json)
