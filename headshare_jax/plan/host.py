"""What a run needs of a host's memory, by arithmetic."""

from math import prod

import jax.numpy as jnp
import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.model.gather import PIECE_BYTES
from headshare_jax.parameters import parameter_names
from headshare_jax.sharing.source import piece_shape

# TPU pods have four chips to a host.
CHIPS_PER_HOST = 4
# float64 sums over the text that a fit has in memory at once: those of both parts of the text, the same of the rows
# that are fitted, of both together, and what it solves for.
_SUMS = 7
_STORED = np.dtype(jnp.bfloat16)


def host_bytes(config: LlamaConfig, state_bytes: int) -> dict[str, int]:
    """Bytes of a host's memory beyond Python and its libraries, by what takes most of them.

    Args:
      config: the architecture, stored in bfloat16.
      state_bytes: of parameters and optimizer state on a chip.

    Returns:
      `place`: the largest slice of a layer or piece of a table, the one that is read meanwhile, and what is on its way
        to the devices.
      `save`: the host's part of a checkpoint while it is written.
      `refit`: sums of one block of attention; the first host alone.
      `export`: a slice, and what is made of it to be written; the first host alone.
    """
    slice_bytes = max(2 * prod(piece_shape(config, name, _STORED)) for name in parameter_names(config))
    rows = config.num_heads * config.head_dim
    return {
        "place": 2 * slice_bytes + 2 * PIECE_BYTES,
        "save": CHIPS_PER_HOST * state_bytes,
        "refit": _SUMS * 8 * (rows * rows + 2 * rows * config.hidden_size),
        "export": 2 * slice_bytes + PIECE_BYTES,
    }
