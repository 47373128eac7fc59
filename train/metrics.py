"""What a run reports: a line a step in `metrics.jsonl`, TensorBoard, speed against the machine's limit, and a plot."""

import json
import math
import secrets
import time
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.chips import published_flops
from headshare_jax.config import LlamaConfig
from headshare_jax.convert import storage
from headshare_jax.convert.atomic import own_file
from headshare_jax.errors import HeadshareError, TryAgain

METRICS, PLOT, _WANDB_ID = "metrics.jsonl", "metrics.png", "wandb.txt"
# Of a line's values, those that depend on the machine.
SPEEDS = ("seconds", "tokens_per_second", "mfu", "of_measured_rate", "goodput", "save_seconds", "held_seconds")
_RATE_SIZE = 2048
# Between two writings of lines to a bucket, where every one writes the whole file anew.
_SECONDS_KEPT = 60.0


class MetricsLog:
    """Metrics of a run, written by the first process.

    TensorBoard files are written too where `tensorboardX` is installed, and Weights & Biases gets them if asked for.
    """

    def __init__(self, folder: Path, *, from_step: int, wandb: str | None = None):
        """Drops the lines after `from_step`, and one that a kill left incomplete.

        Args:
          folder: of the run.
          from_step: that the run goes on after.
          wandb: project at Weights & Biases; None for none.

        Raises:
          HeadshareError: the package wandb is not installed, or cannot reach its server.
        """
        self.path = folder / METRICS
        self._writes = jax.process_index() == 0
        self._board, self._sent_to = None, None
        # Every process has them all, so that all decide alike.
        self._lines: list[str] = []
        if storage.is_file(self.path):
            # A kill may have left anything in the last line.
            with storage.reached(self.path):
                text = self.path.read_text(encoding="utf-8", errors="replace")
            self._lines = [line for line in text.splitlines() if _step_of(line) <= from_step]
        self._written, self._since = len(self._lines), time.monotonic()
        if not self._writes:
            return
        if self._lines or storage.is_file(self.path):
            with own_file(self.path) as partial:
                partial.write_text("".join(f"{line}\n" for line in self._lines), encoding="utf-8")
        if find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if wandb is not None:
            self._sent_to = _wandb_run(wandb, folder)

    def add(self, line: dict[str, Any]) -> None:
        """Adds a step's metrics; numbers that are not finite, which JSON has not, become null."""
        numbers = {name: value for name, value in line.items() if isinstance(value, float)}
        nulls = {name: None for name, value in numbers.items() if not math.isfinite(value)}
        self._lines.append(json.dumps(line | nulls, allow_nan=False))
        if not self._writes:
            return
        if not storage.in_bucket(self.path) or time.monotonic() - self._since > _SECONDS_KEPT:
            self.flush()
        with self._writing():
            if self._board is not None:
                for name, value in numbers.items():
                    self._board.add_scalar(name, value, line["step"])
                self._board.flush()
        if self._sent_to is not None:
            self._sent_to.log(numbers, step=line["step"])

    def flush(self) -> None:
        """Writes what was added."""
        if not self._writes or self._written == len(self._lines):
            return
        with self._writing():
            if storage.in_bucket(self.path):
                self.path.write_text("".join(f"{line}\n" for line in self._lines), encoding="utf-8")
            else:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in self._lines[self._written :])
        self._written, self._since = len(self._lines), time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # A bucket that was not reached would be waited for once more; no line of a step after a checkpoint is needed.
        if kind is None or not issubclass(kind, TryAgain):
            self.flush()
        if self._board is not None:
            self._board.close()
        if self._sent_to is not None:
            self._sent_to.finish(exit_code=0 if kind is None else 1)

    def draw(self) -> None:
        """Draws the plot."""
        if self._writes and (lines := self.lines()):
            from headshare_jax.report.curves import draw_training

            with own_file(self.path.with_name(PLOT)) as partial:
                draw_training(lines).save(partial)

    def lines(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return [json.loads(line) for line in self._lines]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with storage.reached(self.path):
                yield
        except OSError as error:
            raise HeadshareError(
                f"{self.path} cannot be written ({error.strerror}); make room, and resume the run.", option="resume"
            ) from error


def check_wandb() -> None:
    """Raises HeadshareError if the package for Weights & Biases is not installed."""
    if find_spec("wandb") is None:
        raise HeadshareError("Weights & Biases needs its package: pip install 'headshare-jax[wandb]'.", option="wandb")


def _wandb_run(project: str, folder: Path) -> Any:
    """The run at Weights & Biases that is the folder's: a new one, or the one that is gone on with."""
    check_wandb()
    import wandb

    name = folder / _WANDB_ID
    if not name.is_file():
        name.write_text(secrets.token_hex(4), encoding="utf-8")
    local = None if storage.in_bucket(folder) else str(folder)
    try:
        return wandb.init(project=project, id=name.read_text().strip(), name=folder.name, dir=local, resume="allow")
    except wandb.errors.Error as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise HeadshareError(f"Weights & Biases cannot be used: {said}.", option="wandb") from error


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


class Speed:
    """How fast steps are, beside what the devices can do: as published where that is known, or as measured here."""

    def __init__(self, dtype: str, seq_len: int):
        """Takes the type of the matrix products, and the tokens in a sequence."""
        self._seq_len = seq_len
        published = published_flops(jax.devices()[0].device_kind)
        self._name = "mfu" if published else "of_measured_rate"
        self._rate = published * jax.device_count() if published else matrix_rate(dtype)

    def of_step(self, config: LlamaConfig, tokens: float, seconds: float) -> dict[str, float]:
        """`tokens_per_second`, and `mfu` (of the published rate) or `of_measured_rate`."""
        flops = step_flops(config, self._seq_len, int(tokens))
        return {"tokens_per_second": tokens / seconds, self._name: flops / seconds / self._rate}


def matrix_rate(dtype: str) -> float:
    """This machine's measured rate of one large matrix product on all devices, in FLOP/s."""
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
