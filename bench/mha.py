"""A small model with a key for every query head, trained here, and what it costs to make its attention smaller.

Run from the repository root: python bench/mha.py --train articles.txt code.txt --held-out other.txt --folder mha
"""

import itertools
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import machine, report
from rich.table import Table

ENDS = "<|end|>"
BATCH = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a model whose query heads have a key and a value each, and make it smaller by several methods."""

    train: tuple[Path, ...]
    """Texts to train on; the first tokens of the first are what methods are calibrated on."""
    held_out: tuple[Path, ...]
    """Texts to judge on, which nothing else sees."""
    folder: Path
    """Where the trained model lies, or is to lie; one that lies there already is not trained again."""
    layers: int = 6
    """Layers."""
    heads: int = 8
    """Heads, each with queries, keys and values."""
    head_dim: int = 32
    """Width of a head; the model is as wide as all heads together."""
    vocabulary: int = 4096
    """Tokens of the byte-pair encoding made of the texts."""
    steps: int = 1000
    """Steps of training, each of `batch` sequences."""
    batch: int = 8
    """Sequences in a step."""
    seq_len: int = 256
    """Tokens in a sequence, and in a window of held-out text."""
    learning_rate: float = 1e-3
    """Its peak, after a tenth of the steps; a cosine takes it to zero."""
    budgets: tuple[float, ...] = (0.9, 0.8, 0.7, 0.5)
    """Parts of the attention parameters to keep."""
    methods: tuple[str, ...] = ("slim", "drop")
    """Methods to compare; the last is what the others are set against."""
    calibrate_tokens: int = 49152
    """Tokens that methods are calibrated on."""
    windows: int = 40
    """Most windows of each held-out text."""
    quick: bool = False
    """A tiny model instead, to test this benchmark; its figures mean nothing."""
    json: Path | None = None
    """Where to write the result; bench/results/mha.json by default."""


def run(options: Options) -> dict[str, Any]:
    """Trains the model unless that was done, and measures every method at every budget on every held-out text."""
    import headshare_jax as hs

    training = None if (options.folder / "headshare.json").exists() else train(options)
    dense, tokenizer = hs.load(options.folder), hs.load_tokenizer(options.folder)

    def windows(path: Path) -> np.ndarray:
        tokens = token_ids(tokenizer, path.read_text())
        return tokens[: len(tokens) // options.seq_len * options.seq_len].reshape(-1, options.seq_len)

    held_out = {path.name: windows(path)[: options.windows] for path in options.held_out}
    sizes = hs.ledger(dense)
    whole = {name: losses(dense, windows_wt) for name, windows_wt in held_out.items()}
    calibration = windows(options.train[0]).ravel()[: options.calibrate_tokens]
    found = {}
    for budget, method in itertools.product(options.budgets, options.methods):
        done = hs.compress(
            dense, budget=budget, method=method, calibrate=calibration, seq_len=options.seq_len, evaluate=False,
            work=options.folder.with_name(f"{options.folder.name}-work"), progress=False,
        )  # fmt: skip
        found[budget, method] = {name: losses(done.model, windows_wt) for name, windows_wt in held_out.items()}
    return {
        "machine": machine("jax", "flax", "optax", "tokenizers"),
        "options": {key: value for key, value in asdict(options).items() if key not in ("json", "folder")}
        | {key: [path.name for path in getattr(options, key)] for key in ("train", "held_out")},
        "model": {
            "parameters": sizes.stored,
            "attention": sizes.attention_stored,
            "training": training,
            "perplexity": {name: float(np.exp(loss_w.mean())) for name, loss_w in whole.items()},
            "windows": {name: len(loss_w) for name, loss_w in whole.items()},
        },
        "rows": rows(found, whole, options.methods[-1]),
    }


def rows(
    found: dict[tuple[float, str], dict[str, np.ndarray]], whole: dict[str, np.ndarray], last: str
) -> list[dict[str, Any]]:
    """Losses of windows by budget, method and text, beside the dense model's and those of one of the methods."""
    compared = []
    for name, (budget, method) in itertools.product(whole, found):
        ratio, error = times(found[budget, method][name], whole[name])
        against, against_error = times(found[budget, method][name], found[budget, last][name])
        row = {"text": name, "budget": budget, "method": method, "ratio": ratio, "ratio_error": error}
        compared.append(row | {"against_last": against, "against_last_error": against_error})
    return compared


def train(options: Options) -> dict[str, Any]:
    """Trains the tokenizer and, by PostShare's own step, the model; writes both to the folder."""
    import jax
    import jax.numpy as jnp

    import headshare_jax as hs
    from headshare_jax import parameters
    from headshare_jax.train.step import first_state, make_step

    began = time.perf_counter()
    texts = [path.read_text() for path in options.train]
    tokenizer = byte_pairs(texts, options.vocabulary)
    tokens = np.concatenate([token_ids(tokenizer, text) for text in texts])
    model = hs.Llama.init(architecture(options, len(tokenizer)), jax.random.key(0))
    context = stage_context(options, model)
    names = parameters.parameter_names(model.config)
    state, step = first_state(context, {name: getattr(model, name)[...] for name in names}), make_step(context)
    rng, found = np.random.default_rng(0), []
    for number in range(options.steps):
        starts_b = rng.integers(len(tokens) - options.seq_len, size=options.batch)
        batch = jnp.asarray(tokens[starts_b[:, None] + np.arange(options.seq_len)])[None]
        state, metrics = step(state, {}, {}, batch, jnp.ones_like(batch))
        found.append(float(metrics["lm_loss"]))
        if number % 50 == 0:
            print(f"step {number}: {found[-1]:.3f} nats a token, {time.perf_counter() - began:.0f} s", flush=True)
    hs.save(hs.Llama(model.config, state.params), options.folder, to="native", tokenizer_from=tokenizer)
    return {
        "seconds": time.perf_counter() - began,
        "text_tokens": len(tokens),
        "tokens": options.steps * options.batch * options.seq_len,
        "last_loss": float(np.mean(found[-50:])),
    }


def architecture(options: Options, vocabulary: int) -> Any:
    """The model's shape: as many keys as queries."""
    from headshare_jax import LlamaConfig

    width = options.heads * options.head_dim
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_layers=options.layers,
        num_heads=options.heads,
        num_kv_heads=options.heads,
        head_dim=options.head_dim,
        tie_word_embeddings=True,
    )


def stage_context(options: Options, model: Any) -> Any:
    """What the step is made for: tied training of the map that changes nothing, which trains the dense model."""
    from headshare_jax import match, sharing_map
    from headshare_jax.train.recipe import Data, Optimizer, Recipe, Stage
    from headshare_jax.train.step import StageContext

    stage = Stage(kind="tied", steps=options.steps, learning_rate=options.learning_rate)
    recipe = Recipe(
        model="",
        data=Data(train="", seq_len=options.seq_len),
        stages=(stage,),
        optimizer=Optimizer(warmup=options.steps // 10),
        batch_size=options.batch,
        compute_dtype="float32",
        remat="none",
    )
    return StageContext(model.config, sharing_map(match(model, "random"), 0.0), stage, recipe)


def token_ids(tokenizer: Any, text: str) -> np.ndarray:
    """int32 [tokens]."""
    return np.asarray(tokenizer(text, verbose=False).input_ids, np.int32)


def byte_pairs(texts: list[str], size: int) -> Any:
    """A tokenizer of so many tokens, made of the texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(texts, vocab_size=size, special_tokens=[ENDS], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=pairs._tokenizer, eos_token=ENDS)


def losses(source: Any, windows_wt: np.ndarray) -> np.ndarray:
    """Mean negative log-likelihood of every window, float64 [W], in nats a token."""
    from headshare_jax import Llama
    from headshare_jax.evaluate.perplexity import next_token_scores

    model = Llama.of(source)
    parts = [next_token_scores(model, windows_wt[at : at + BATCH])[0] for at in range(0, len(windows_wt), BATCH)]
    return np.concatenate(parts).mean(axis=1, dtype=np.float64)


def times(loss_w: np.ndarray, other_w: np.ndarray) -> tuple[float, float]:
    """A perplexity divided by another of the same windows, and the standard error over them."""
    ratio = math.exp((loss_w - other_w).mean())
    return ratio, ratio * float((loss_w - other_w).std(ddof=1)) / math.sqrt(len(loss_w))


def tables(result: dict[str, Any]) -> list[Table]:
    model, last = result["model"], result["options"]["methods"][-1]
    title = f"{model['parameters'] / 1e6:.1f} million parameters, {model['attention'] / 1e6:.1f} of them attention's"
    table = Table("text", "of attention kept", "method", "perplexity / dense", f"perplexity / {last}", title=title)
    for row in result["rows"]:
        table.add_row(
            row["text"],
            f"{row['budget']:.0%}",
            row["method"],
            f"{row['ratio']:.4f} ± {row['ratio_error']:.4f}",
            f"{row['against_last']:.4f} ± {row['against_last_error']:.4f}",
        )
    return [table]


if __name__ == "__main__":
    options = tyro.cli(Options)
    if options.quick:
        options = replace(
            options, layers=3, heads=4, head_dim=16, vocabulary=300, steps=3, batch=2, seq_len=32, budgets=(0.7,),
            calibrate_tokens=512, windows=4,
        )  # fmt: skip
    result = run(options)
    dense = [
        f"{name}: dense perplexity {perplexity:.2f}, {result['model']['windows'][name]} windows of {options.seq_len}"
        for name, perplexity in result["model"]["perplexity"].items()
    ]
    report("mha", result, tables(result), dense, options.json)
