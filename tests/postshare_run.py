"""A short PostShare run of a tiny model, and what tests ask of such runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np

import headshare_jax as hs
from headshare_jax.convert import map_file, tokenizer
from headshare_jax.fit.refit import refit
from headshare_jax.parameters import parameter_names
from headshare_jax.train import recipe as recipes

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps.\n" * 150
ALIGN = {"kind": "align", "steps": 5, "learning_rate": 1e-3}
TIED = {"kind": "tied", "steps": 4, "learning_rate": 1e-3}
REFIT = {"sharing": {"ratio": 0.5, "refit_windows": 6}}


def recipe(workplace: Path, **changes: Any) -> recipes.Recipe:
    """A short run: align, then tied, in float32 on all eight devices."""
    document: dict[str, Any] = {
        "model": str(workplace / "model"),
        "data": {"train": str(workplace / "train.txt"), "eval": str(workplace / "held-out.txt"), "seq_len": 32},
        "sharing": {"ratio": 0.5},
        "stages": [ALIGN, TIED],
        "batch_size": 8,
        "compute_dtype": "float32",
        "remat": "none",
        "checkpoints": {"every": 2, "keep": 2, "eval_every": 3},
    }
    return recipes.from_mapping(document | changes)


def metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and penalty of every line."""
    return [(line["step"], line["loss"], line["sim_loss"]) for line in metrics(run)]


def final_weights(run: Path) -> dict[str, np.ndarray]:
    """Parameters of the model that a run ended with."""
    model = hs.load(run / "final")
    return {name: np.asarray(getattr(model, name)[...]) for name in parameter_names(model.config)}


def refitted(dense: hs.Llama, run: Path) -> hs.Llama:
    """A dense model shared by a run's map, its output weights fitted on the first six windows of the run's text."""
    windows = np.array(tokenizer.load(run / "final")(TEXT).input_ids[: 6 * 32], np.int32).reshape(6, 32)
    shared = hs.share(dense, map_file.read(run / "map.json"), check_source=False)
    return refit(dense, shared, windows)[0]
