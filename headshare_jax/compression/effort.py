"""What making a model smaller will take, before it is begun: relative costs of its phases, memory, and disk.

Costs are in multiply-adds, memory in bytes; both are estimates. What a text costs is counted by its tokens.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from headshare_jax.calibration.own_text import cache_bytes
from headshare_jax.config import LlamaConfig
from headshare_jax.matching.functional import FunctionalSettings
from headshare_jax.methods.scored import ScoredMethod
from headshare_jax.methods.slimming import SlimMethod
from headshare_jax.methods.work import Amount, Method
from headshare_jax.parameters import layered_names, slice_shape
from headshare_jax.slim.rounds import SlimSettings, round_targets

# What phases cost against plain products of matrices, by SmolLM2-135M on two cores: gradients and pairs of matching,
# gradients and costs of slimming, whose first round of three alone runs layers forward, both models of a refit and its
# sums, the measurement of both, a token at a time, files.
_FORWARD, _HEAD, _BACKWARD, _TRIED = 0.7, 6.4, 2.6, 12.5
_SLIM_FORWARD, _SLIM_HEAD, _SLIM_BACKWARD = 0.2, 1.8, 1.6
_REFITTING, _MEASURING, _DECODING, _WRITING = 1.9, 2.6, 3.4, 1500.0
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
      amount: how much is to be done without; None where a map that exists is used as it is.
    """

    config: LlamaConfig
    method: Method
    seq_len: int
    calibration: int
    own: int
    measured: int
    amount: Amount | None

    @property
    def costs(self) -> dict[str, float]:
        """Multiply-adds of every phase, by its label."""
        through = self.config.num_layers * self._layer
        tokens, measured = self.seq_len * self.calibration, self.seq_len * self.measured
        costs = {
            "writing text": self.seq_len * self.own * (through + self._head) * _DECODING,
            "matching": sum(self._matching) if self._matches else 0.0,
            "slimming": sum(self._slimming),
            "refitting": tokens * through * _REFITTING if self._refits else 0.0,
            "writing": through * _WRITING,
            "measuring": measured * _MEASURING * (through + self._head),
        }
        return {label: float(cost) for label, cost in costs.items() if cost}

    def part(self, label: str, steps: float) -> float:
        """The part of a phase's cost that a part of its steps is, where they do not all cost the same."""
        costs = self._slimming if label == "slimming" else self._matching if self.method.functional else []
        if label not in ("matching", "slimming") or not costs:
            return steps
        # Each of the steps is a layer: forward, with the head behind the last, backward, and its pairs or its fit.
        layers, ends, done = self.config.num_layers, [0.0], [0.0]
        for place, (forward, head, backward, third) in enumerate(np.reshape(costs, (-1, 4)).tolist()):
            ends += [3 * place + end for end in (1, 1 + 1 / layers, 2, 3)]
            done += [forward, head + backward / layers, backward - backward / layers, third]
        return float(np.interp(steps, np.divide(ends, ends[-1]), np.cumsum(done) / sum(done)))

    @property
    def _matches(self) -> bool:
        return self.amount is not None and (isinstance(self.method, ScoredMethod) or self.method.functional)

    @property
    def _slims(self) -> bool:
        return isinstance(self.method, SlimMethod)

    @property
    def _refits(self) -> bool:
        return isinstance(self.method, ScoredMethod) and self.method.refits

    @property
    def _matching(self) -> list[float]:
        """Costs of matching: layers forward, gradients of the head and backward, and pairs; or pairs alone."""
        config, through = self.config, self.config.num_layers * self._layer
        if not self.method.functional:
            return [through * config.num_units / 2]
        tokens = self.seq_len * min(self.calibration, FunctionalSettings().windows)
        # Scores of attention, of every donor that is tried.
        width = config.num_layers * config.num_heads * config.head_dim
        tried = 2 * (FunctionalSettings().span + 1) * width * self.seq_len
        costs = (_FORWARD * through, _HEAD * self._head, _BACKWARD * through, _TRIED * tried)
        return [tokens * cost for cost in costs]

    @property
    def _slimming(self) -> list[float]:
        """Costs of every round: layers forward, gradients of the head, backward with costs of widths, and the fit."""
        if not self._slims or self.amount is None or self.amount.budget is None:
            return []
        through, settings = self.config.num_layers * self._layer, SlimSettings()
        tokens, rounds = self.seq_len * self.calibration, len(round_targets(self.amount.budget))
        scored, fitted = min(tokens, settings.scoring_tokens), min(tokens, settings.round_tokens)
        each = (_SLIM_FORWARD * through, _SLIM_HEAD * self._head, _SLIM_BACKWARD * through)
        scoring = [scored * cost for cost in each]
        fits = [*[fitted] * (rounds - 1), tokens]
        return [cost for fit in fits for cost in (*scoring, fit * through * _REFITTING)]

    @property
    def memory(self) -> int:
        """Bytes: a layer of both models, output heads, sums of products in float64, and a batch's activations.

        With text of its own, also the whole model and the keys and values of what it writes.
        """
        config = self.config
        width, inner = config.hidden_size, config.num_heads * config.head_dim
        sums = 8 * (3 * inner * inner + 6 * inner * width) if self._refits or self._slims else 0
        # New values and outputs of all layers.
        slices = 4 * config.num_layers * 2 * inner * width if self._slims else 0
        batch = 4 * _BATCH_TOKENS * (8 * width + 2 * config.intermediate_size + 2 * config.num_heads * self.seq_len)
        whole = 4 * (config.num_layers * self._layer + self._head) if self.own else 0
        whole += cache_bytes(config, self.own, self.seq_len) if self.own else 0
        return 4 * (2 * self._layer + 2 * self._head) + sums + slices + batch + whole

    @property
    def temporary(self) -> int:
        """Bytes of hidden states and gradients in temporary files."""
        config = self.config
        state, heads = 4 * self.seq_len * config.hidden_size, 4 * self.seq_len * config.num_heads * config.head_dim
        fit = self.calibration * (2 * state + (heads if self._refits or self._slims else 0))
        room = 0
        if self._slims:
            scored = min(self.calibration, -(-SlimSettings().scoring_tokens // self.seq_len))
            fit += scored * (config.num_layers + 1) * state
        if self.method.functional:
            room = min(self.calibration, FunctionalSettings().windows) * (config.num_layers + 2) * state
        return max(room, fit, 2 * self.measured * state)

    @property
    def _layer(self) -> int:
        return sum(prod(slice_shape(self.config, name)) for name in layered_names(self.config))

    @property
    def _head(self) -> int:
        return self.config.vocab_size * self.config.hidden_size
