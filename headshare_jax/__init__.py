"""Makes LLaMA-family language models smaller by letting attention heads share weights, in JAX and Flax."""

import warnings
from pathlib import Path
from typing import Any

# In a clone, convert/ and train/ lie beside this folder, not in it; Python that starts there finds this folder first.
if not (Path(__file__).parent / "convert").exists():
    __path__.append(str(Path(__file__).parents[1]))

from headshare_jax.calibration.own_text import own_text
from headshare_jax.calibration.windows import calibration_windows
from headshare_jax.compression.compress import compress
from headshare_jax.compression.record import Compressed
from headshare_jax.config import LlamaConfig, RopeScaling
from headshare_jax.convert import open_checkpoint, save
from headshare_jax.convert.journal_folder import JournalFolder
from headshare_jax.errors import HeadshareError
from headshare_jax.evaluate.agreement import Agreement, agreement
from headshare_jax.evaluate.perplexity import Perplexity, perplexity
from headshare_jax.fit.refit import BlockFit, RefitReport, RefitSettings, refit
from headshare_jax.generation import generate, load_sampling, stream
from headshare_jax.loading import load, load_tokenizer
from headshare_jax.matching.cosine import match
from headshare_jax.matching.functional import FunctionalSettings, match_functional
from headshare_jax.model.generate import Sampling
from headshare_jax.model.llama import Llama
from headshare_jax.model.share import share, unshare
from headshare_jax.model.stream import Conversation
from headshare_jax.sharing.budget import budget_map
from headshare_jax.sharing.choose import drop_map, sharing_map
from headshare_jax.sharing.ledger import Ledger, ledger
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult
from headshare_jax.sharing.source import WeightSource, fingerprint
from headshare_jax.sharing.view import SharedView
from headshare_jax.sharing.widths import Widths

__all__ = [
    "Agreement",
    "BlockFit",
    "Compressed",
    "Conversation",
    "FunctionalSettings",
    "HeadshareError",
    "JournalFolder",
    "Ledger",
    "Llama",
    "LlamaConfig",
    "MatchResult",
    "Perplexity",
    "RefitReport",
    "RefitSettings",
    "RopeScaling",
    "Sampling",
    "SharedView",
    "SharingMap",
    "WeightSource",
    "Widths",
    "agreement",
    "budget_map",
    "calibration_windows",
    "compress",
    "drop_map",
    "fingerprint",
    "generate",
    "ledger",
    "load",
    "load_sampling",
    "load_tokenizer",
    "match",
    "match_functional",
    "open_checkpoint",
    "own_text",
    "perplexity",
    "refit",
    "save",
    "share",
    "sharing_map",
    "stream",
    "unshare",
]

# Old names, kept for one release.
_RENAMED = {"Search": "FunctionalSettings"}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is now {_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
