"""Checkpoints of a run: written in the background, the last few and the best kept, the newest whole one restored."""

import json
import logging
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from headshare_jax.errors import HeadshareError

logger = logging.getLogger(__name__)

FORMAT = "headshare-postshare"


class RunCheckpoints:
    """The folder `checkpoints/` of a run.

    Every checkpoint holds the arrays of the training state, and plain data: their checksums, the recipe, the stage, the
    map, and whatever else a resumed run needs to know. Used as a context manager, it waits for the last save to be
    complete.
    """

    def __init__(self, folder: Path, keep: int):
        """Keeps the last `keep` checkpoints, and the one with the lowest perplexity.

        Raises:
          HeadshareError: the folder cannot be used.
        """
        self.folder = folder
        best = managers.BestN(get_metric_fn=_quality, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(n=keep), best]),
            # The policy decides alone what is kept; without this, metrics are not stored, and a resumed run has none.
            best_fn=_quality,
            cleanup_tmp_directories=True,
        )
        _forget_unreadable_metrics(folder)
        try:
            self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
        except (OSError, ValueError) as error:
            raise HeadshareError(f"The checkpoints in {folder} cannot be listed: {error}.") from error

    def __enter__(self) -> Self:
        logging.getLogger("absl").addFilter(_below_errors)
        self._excepthook, sys.excepthook = sys.excepthook, _without_echoes
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.wait()
            self._manager.close()
        finally:
            logging.getLogger("absl").removeFilter(_below_errors)
            sys.excepthook = self._excepthook

    def save(self, step: int, arrays: Any, document: dict[str, Any], perplexity: float | None) -> None:
        """Begins to save; an earlier save that failed shows here or in `wait`.

        Raises:
          HeadshareError: a checkpoint could not be written; earlier ones are intact.
        """
        document = {"format": FORMAT, "checksums": checksums(arrays), **document}
        items = ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays), document=ocp.args.JsonSave(document))
        metrics = None if perplexity is None else {"perplexity": perplexity}
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def wait(self) -> None:
        """Returns once the save that was begun is complete; raises HeadshareError if it failed."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise HeadshareError(
                f"A checkpoint in {self.folder} could not be written ({_reason(error)}); earlier ones are intact."
            ) from error

    def restore(self, abstract: Callable[[dict[str, Any]], Any]) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint that can be gone on from: its step, arrays and document; None if there is none at all.

        Newer ones, damaged or of another run, are named and removed: the run does their steps again.

        Args:
          abstract: gives, for a checkpoint's document, the tree of shapes, types and shardings to restore into. Raises
            HeadshareError for a checkpoint of another run.

        Raises:
          HeadshareError: there are checkpoints, but none can be gone on from.
        """
        reasons: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                document = self._document(step)
                target = abstract(document)
                restore_args = ocp.checkpoint_utils.construct_restore_args(target)
                items = ocp.args.Composite(arrays=ocp.args.PyTreeRestore(target, restore_args=restore_args))
                arrays = self._manager.restore(step, args=items).arrays
                if checksums(arrays) != document["checksums"]:
                    raise HeadshareError("its arrays are not those that were saved")
            except Exception as error:  # Orbax and its storage show damage in many ways
                said = (str(error).splitlines() or [type(error).__name__])[0]
                reasons[step] = textwrap.shorten(said, 160, placeholder=" ...").rstrip(".")
                logger.warning(
                    "The checkpoint of step %d cannot be used (%s); trying the one before.", step, reasons[step]
                )
                continue
            # Left where they are, they would count among the last that are kept, and be in the way of the same steps.
            for unusable in reasons:
                self._manager.delete(unusable)
            return step, arrays, document
        if reasons:
            newest = max(reasons)
            raise HeadshareError(
                f"None of the {len(reasons)} checkpoints in {self.folder} can be gone on from; step {newest}: "
                f"{reasons[newest]}."
            )
        return None

    def _document(self, step: int) -> dict[str, Any]:
        items = self._manager.restore(step, args=ocp.args.Composite(document=ocp.args.JsonRestore()))
        document: dict[str, Any] = items.document
        if document.get("format") != FORMAT:
            raise HeadshareError(f"{self.folder / str(step)} is not a checkpoint of a PostShare run.")
        if "checksums" not in document:
            raise HeadshareError("it is of an earlier version, which kept no checksums; begin a new run")
        return document


def _below_errors(record: logging.LogRecord) -> bool:
    """Orbax logs every error of its threads with a traceback, and raises it too."""
    return record.levelno < logging.ERROR


def _without_echoes(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Leaves out what TensorStore's threads say after a write failed, of which Orbax no longer waits for the others."""
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _reason(error: Exception) -> str:
    """The system's own reason, which TensorStore tells in its text alone."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else textwrap.shorten(str(error), 160, placeholder=" ...")


def checksums(arrays: Any) -> list[int]:
    """Of every array of a tree, the sum of its 32-bit words, each times an odd number by its place, modulo 2^32.

    A changed bit changes it, which Orbax, OCDBT and zarr restore without a word; how an array is cut over devices does
    not, so that a run is resumed on another mesh. It is taken where the arrays lie.
    """
    return [int(_checksum(leaf)) for leaf in jax.tree.leaves(arrays)]


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    if array.ndim < 3:
        return _weighted_sum(array, jnp.uint32(0))
    # Layer by layer, or head by head: a CPU holds all the products that it sums.
    count, size = array.shape[0], math.prod(array.shape[1:])
    first_of_row = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(size % 2**32)
    return jnp.sum(jax.lax.map(lambda row: _weighted_sum(*row), (array, first_of_row)), dtype=jnp.uint32)


def _weighted_sum(array: jax.Array, first: jax.Array) -> jax.Array:
    """Sum of an array's words, the i-th times 2 (first + i) + 1."""
    place, stride = jnp.full(array.shape, first), 1
    for axis in reversed(range(array.ndim)):
        place += jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        stride *= array.shape[axis]
    return jnp.sum(_words(array) * (2 * place + 1), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits of every element, uint32 of the array's shape."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = array if array.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(array, unsigned)
    return bits.astype(jnp.uint32)


def _quality(metrics: dict[str, float]) -> float:
    """The higher, the better."""
    return -metrics["perplexity"]


def _forget_unreadable_metrics(folder: Path) -> None:
    """Removes metrics over which Orbax would stop before a checkpoint is read; such a checkpoint is not the best."""
    for file in folder.glob("*/metrics/metrics"):
        try:
            float(json.loads(file.read_text())["perplexity"])
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(file.parent, ignore_errors=True)
