"""The held-out text of a run: how well its models predict it, beside the dense model that it began with."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from headshare_jax.convert.atomic import own_file
from headshare_jax.evaluate.agreement import Agreement, agreement
from headshare_jax.evaluate.perplexity import perplexity
from headshare_jax.model.llama import Llama
from headshare_jax.sharing.finite import NotFinite
from headshare_jax.sharing.source import WeightSource
from headshare_jax.train import recipe as recipes

# In a run's folder: what the dense model and the one that training began with came to.
BASELINE = "baseline.json"


class HeldOut:
    """A text on which the models of a run are measured.

    Attributes:
      source_perplexity, start_perplexity: of the dense model that the run began with, and of the shared model before
        any training; None where they were not measured or are not finite.
    """

    def __init__(self, settings: recipes.Data, tokens: np.ndarray):
        """Takes the text as int32 [tokens]; without any, nothing is measured."""
        self._settings, self._tokens = settings, tokens
        self.source_perplexity: float | None = None
        self.start_perplexity: float | None = None

    def __bool__(self) -> bool:
        return bool(self._tokens.size)

    def perplexity(self, model: Llama, progress: Callable[[int, int], None] = lambda done, total: None) -> float | None:
        """Of a model on the first windows; None where it is not finite."""
        settings = self._settings
        try:
            found = perplexity(
                model, self._tokens, seq_len=settings.seq_len, max_windows=settings.eval_windows, progress=progress
            )
        except NotFinite:
            return None
        return found.token_perplexity if math.isfinite(found.token_perplexity) else None

    def restore(self, folder: Path) -> bool:
        """Takes over what a run's folder says of the dense model and the start; False if that must be measured."""
        try:
            stored = json.loads((folder / BASELINE).read_text())
            source, start = (stored[name] for name in ("source_perplexity", "start_perplexity"))
            self.source_perplexity, self.start_perplexity = (
                None if value is None else float(value) for value in (source, start)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def keep(self, folder: Path) -> None:
        """Writes both into the run's folder."""
        if jax.process_index() == 0:
            values = {"source_perplexity": self.source_perplexity, "start_perplexity": self.start_perplexity}
            with own_file(folder / BASELINE) as path:
                path.write_text(json.dumps(values, indent=1))

    def agreement(
        self, dense: WeightSource, final: WeightSource, mesh: Mesh, progress: Callable[[int, int], None]
    ) -> Agreement | None:
        """How far the final model is from the dense one; None without a text, or where predictions are not finite.

        On a mesh of several devices both lie there as a whole, and all of its processes call it; else layer by layer.
        """
        length = min(self._settings.seq_len, self._tokens.size)
        if length < 2:
            return None
        windows = min(self._tokens.size // length, self._settings.eval_windows)
        windows_wt = self._tokens[: windows * length].reshape(windows, length)
        if mesh.size > 1:
            dense, final = (Llama.of(source, mesh=mesh) for source in (dense, final))
        try:
            return agreement(dense, final, windows_wt, progress=progress)
        except NotFinite:
            return None
