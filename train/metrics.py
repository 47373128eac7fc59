"""What a run reports: a line a step in `metrics.jsonl`, TensorBoard, speed against the machine's limit, and a plot."""

import json
import math
import timeit
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.convert.atomic import own_file
from headshare_jax.errors import HeadshareError

METRICS, PLOT = "metrics.jsonl", "metrics.png"
# Of a line's values, those that depend on the machine.
SPEEDS = ("seconds", "tokens_per_second", "mfu")
_RATE_SIZE = 2048


class MetricsLog:
    """Metrics of a run, written by the first process.

    TensorBoard files are written too where `tensorboardX` is installed.
    """

    def __init__(self, folder: Path, *, from_step: int):
        """Drops the lines after `from_step`, and one that a kill left incomplete."""
        self.path = folder / METRICS
        self._writes = jax.process_index() == 0
        self._board = None
        if not self._writes:
            return
        if find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if self.path.is_file():
            kept = [line for line in self._text().splitlines() if _step_of(line) <= from_step]
            with own_file(self.path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept))

    def add(self, line: dict[str, Any]) -> None:
        """Adds a step's metrics; numbers that are not finite, which JSON has not, become null."""
        if not self._writes:
            return
        numbers = {name: value for name, value in line.items() if isinstance(value, float)}
        nulls = {name: None for name, value in numbers.items() if not math.isfinite(value)}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line | nulls, allow_nan=False) + "\n")
            if self._board is not None:
                for name, value in numbers.items():
                    self._board.add_scalar(name, value, line["step"])
                self._board.flush()
        except OSError as error:
            raise HeadshareError(
                f"{self.path} cannot be written ({error.strerror}); make room, and resume the run.", option="resume"
            ) from error

    def close(self) -> None:
        """Draws the plot and closes the files."""
        if not self._writes:
            return
        if self._board is not None:
            self._board.close()
        if lines := self.lines():
            from headshare_jax.report.curves import draw_training

            with own_file(self.path.with_name(PLOT)) as partial:
                draw_training(lines).save(partial)

    def lines(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return [json.loads(line) for line in self._text().splitlines()] if self.path.is_file() else []

    def _text(self) -> str:
        # A kill may have left anything in the last line, which is dropped.
        return self.path.read_text(encoding="utf-8", errors="replace")


def is_spike(before: Sequence[float], loss: float) -> bool:
    """Whether a step's loss stands out above those of the steps before it.

    It does six standard deviations above their median, as the median deviation gives it for a normal distribution,
    and at least a tenth above it; the last fifty that are finite are looked at, and at least ten are needed.
    """
    recent = np.array([value for value in before if math.isfinite(value)][-50:])
    if len(recent) < 10 or not math.isfinite(loss):
        return False
    median = float(np.median(recent))
    deviation = 1.4826 * float(np.median(np.abs(recent - median)))
    return loss > median + max(6 * deviation, 0.1 * median)


def step_flops(config: LlamaConfig, seq_len: int, tokens: int) -> float:
    """Floating-point operations of a training step's matrix products, forward and backward (without remat)."""
    projections = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    attention = config.num_heads * config.head_dim * seq_len
    per_token = config.num_layers * (projections + mlp + attention) + config.hidden_size * config.vocab_size
    return 6.0 * per_token * tokens


def matrix_rate(dtype: str) -> float:
    """This machine's measured rate of one large matrix product on all local devices, in FLOP/s."""
    a = jnp.ones((_RATE_SIZE, _RATE_SIZE), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    seconds = min(timeit.repeat(lambda: product(a).block_until_ready(), number=1, repeat=3))
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return 2.0 * _RATE_SIZE**3 / seconds * devices


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
