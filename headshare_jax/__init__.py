"""Makes LLaMA-family language models smaller by letting attention heads share weights, in JAX and Flax."""

from headshare_jax.budget import budget_map
from headshare_jax.calibration import calibration_windows
from headshare_jax.config import LlamaConfig, RopeScaling
from headshare_jax.convert import load, open_checkpoint, save
from headshare_jax.convert.journal_folder import JournalFolder
from headshare_jax.errors import HeadshareError
from headshare_jax.evaluation import Perplexity, perplexity
from headshare_jax.functional import Search, match_functional
from headshare_jax.generation import Sampling, generate
from headshare_jax.ledger import Ledger, ledger
from headshare_jax.modeling import Llama
from headshare_jax.parameters import WeightSource, fingerprint
from headshare_jax.refit import BlockFit, RefitReport, RefitSettings, refit
from headshare_jax.selection import drop_map, sharing_map
from headshare_jax.sharing import SharingMap
from headshare_jax.similarity import MatchResult, match
from headshare_jax.transform import share, unshare

__all__ = [
    "BlockFit",
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
    "Search",
    "SharingMap",
    "WeightSource",
    "budget_map",
    "calibration_windows",
    "drop_map",
    "fingerprint",
    "generate",
    "ledger",
    "load",
    "match",
    "match_functional",
    "open_checkpoint",
    "perplexity",
    "refit",
    "save",
    "share",
    "sharing_map",
    "unshare",
]
