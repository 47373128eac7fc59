"""What making a model smaller will take, before it is begun: relative costs of its phases, memory, and disk.

Costs are in multiply-adds, memory in bytes; both are estimates. What a text costs is counted by its tokens.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.matching.functional import FunctionalSettings
from headshare_jax.methods.scored import ScoredMethod
from headshare_jax.methods.work import Method
from headshare_jax.parameters import layered_names, slice_shape

# What phases cost against plain products of matrices, by SmolLM2-135M on two cores: gradients and pairs of matching,
# both models of a refit and its sums, the measurement of both, a token at a time, files.
_FORWARD, _HEAD, _BACKWARD, _TRIED = 0.7, 6.4, 2.6, 12.5
_REFITTING, _MEASURING, _DECODING, _WRITING = 2.1, 2.6, 4.0, 1500.0
# Tokens that phases run at a time.
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Effort:
    """The work that `compress` is asked for.

    Attributes:
      config: of the model.
      method: that is used.
      seq_len: tokens in a window.
      calibration: windows of calibration text.
      own: windows that the model writes itself.
      measured: windows that both models are measured on.
      matches: whether pairs are scored; a map that exists is used as it is.
    """

    config: LlamaConfig
    method: Method
    seq_len: int
    calibration: int
    own: int
    measured: int
    matches: bool

    @property
    def costs(self) -> dict[str, float]:
        """Multiply-adds of every phase, by its label."""
        through = self.config.num_layers * self._layer
        tokens, measured = self.seq_len * self.calibration, self.seq_len * self.measured
        costs = {
            "writing text": self.seq_len * self.own * (through + self._head) * _DECODING,
            "matching": sum(self._matching) if self.matches else 0.0,
            "refitting": tokens * through * _REFITTING if self._refits else 0.0,
            "writing": through * _WRITING,
            "measuring": measured * _MEASURING * (through + self._head),
        }
        return {label: float(cost) for label, cost in costs.items() if cost}

    def part(self, label: str, steps: float) -> float:
        """The part of a phase's cost that a part of its steps is; matching's by function do not all cost the same."""
        if label != "matching" or not self._functional:
            return steps
        layers, costs = self.config.num_layers, self._matching
        forward, head, backward, _ = costs
        # A third of the steps each is for the layers forward, backward, and their pairs; the head comes in between.
        ends = np.array([0, 1, 1 + 1 / layers, 2, 3]) / 3
        done = np.array([0, forward, forward + head + backward / layers, forward + head + backward, sum(costs)])
        return float(np.interp(steps, ends, done / done[-1]))

    @property
    def _functional(self) -> bool:
        return isinstance(self.method, ScoredMethod) and self.method.functional

    @property
    def _refits(self) -> bool:
        return isinstance(self.method, ScoredMethod) and self.method.refits

    @property
    def _matching(self) -> list[float]:
        """Costs of matching: layers forward, gradients of the head and backward, and pairs; or pairs alone."""
        config, through = self.config, self.config.num_layers * self._layer
        if not self._functional:
            return [through * config.num_units / 2]
        tokens = self.seq_len * min(self.calibration, FunctionalSettings().windows)
        # Scores of attention, of every donor that is tried.
        width = config.num_layers * config.num_heads * config.head_dim
        tried = 2 * (FunctionalSettings().span + 1) * width * self.seq_len
        costs = (_FORWARD * through, _HEAD * self._head, _BACKWARD * through, _TRIED * tried)
        return [tokens * cost for cost in costs]

    @property
    def memory(self) -> int:
        """Bytes: a layer of both models, output heads, sums of products in float64, and a batch's activations."""
        config = self.config
        width, inner = config.hidden_size, config.num_heads * config.head_dim
        sums = 8 * (3 * inner * inner + 6 * inner * width) if self._refits else 0
        batch = 4 * _BATCH_TOKENS * (8 * width + 2 * config.intermediate_size + 2 * config.num_heads * self.seq_len)
        whole = 4 * (config.num_layers * self._layer + self._head) if self.own else 0
        return 4 * (2 * self._layer + 2 * self._head) + sums + batch + whole

    @property
    def temporary(self) -> int:
        """Bytes of hidden states and gradients in temporary files."""
        state = 4 * self.seq_len * self.config.hidden_size
        matched = min(self.calibration, FunctionalSettings().windows)
        gradients = matched * self.config.num_layers if self._functional else 0
        return state * max(gradients + matched, 2 * self.calibration, 2 * self.measured)

    @property
    def _layer(self) -> int:
        return sum(prod(slice_shape(self.config, name)) for name in layered_names(self.config))

    @property
    def _head(self) -> int:
        return self.config.vocab_size * self.config.hidden_size
