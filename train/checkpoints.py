"""Checkpoints of a run: written while steps go on, the last few and the best kept, the newest whole one restored."""

import json
import logging
import re
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.convert import bucket_errors, checkpoint_document, storage, stored_tree
from headshare_jax.convert.checkpoint_document import ARRAYS
from headshare_jax.convert.stored_tree import Part, StoredTree
from headshare_jax.errors import HeadshareError, TryAgain
from headshare_jax.processes.agreement import from_first, together
from headshare_jax.resources import free_memory
from headshare_jax.train import checkpoints_before

logger = logging.getLogger(__name__)

# Arrays are copied to the host and written from there if so much of its free memory holds the copy; else the steps
# wait until they are written.
_MOST_OF_MEMORY = 0.7


@dataclass(frozen=True)
class Save:
    """A checkpoint that is about to be written.

    Attributes:
      seconds: so long were steps held until now.
      start: lets it be written in the background.
    """

    seconds: float
    start: Callable[[], None]


@dataclass(frozen=True)
class _Job:
    """What is written."""

    step: int
    folder: Path
    document: dict[str, Any]
    state: dict[str, Part]
    frozen: dict[str, Part]


class RunCheckpoints:
    """The folder `checkpoints/` of a run; in a distributed run all processes call the same methods together.

    A checkpoint, in the folder of its step's number, holds the arrays of the training state, and a document that is
    written last: the recipe, the stage, the map, and whatever else a resumed run needs to know. The parameters that do
    not train in a stage are written once, beside its checkpoints. Used as a context manager, it waits for the last save
    to be complete.

    Attributes:
      newest: step of the last whole checkpoint; None as long as there is none that this process knows of.
    """

    def __init__(self, folder: Path, keep: int):
        """Keeps the last `keep` checkpoints, and the one with the lowest perplexity."""
        self.folder, self.keep = folder, keep
        self.newest: int | None = None
        # Of every whole checkpoint, its perplexity and where its frozen parameters are.
        self._known: dict[int, dict[str, Any]] = {}
        # The stage whose frozen parameters are written, and what its checkpoints say of them.
        self._frozen: tuple[int, dict[str, Any]] | None = None
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()

    def save(self, step: int, arrays: Any, document: Mapping[str, Any], perplexity: float | None) -> Save:
        """Copies arrays to the host, so that the next step may change them; `start` of the result then writes them.

        An earlier save is waited for, and if it failed that shows here or in `wait`. Where the host has no room for a
        copy, the arrays are written here.

        Args:
          step: the checkpoint's name.
          arrays: `state`, what steps change, and `frozen`, what stays as it is in a stage.
          document: plain data, with the number of the stage as `stage`.
          perplexity: by which the best is known.

        Raises:
          HeadshareError: a checkpoint could not be written; earlier ones are intact.
        """
        started = time.perf_counter()
        self.wait()
        state, frozen = arrays["state"], arrays["frozen"]
        if self._frozen is not None and self._frozen[0] == document["stage"]:
            frozen = {}
        free, needed = free_memory(), _local_bytes((state, frozen))
        copies = free is None or needed < _MOST_OF_MEMORY * free
        if copies:
            for leaf in jax.tree.leaves((state, frozen)):
                leaf.copy_to_host_async()
        job = _Job(
            step,
            self.folder / str(step),
            {**document, "step": step, "perplexity": perplexity},
            _parts(state, copies),
            _parts(frozen, copies),
        )
        if not copies:
            self._write(job)
        begin = partial(self._begin, job, written=not copies)
        return Save(time.perf_counter() - started, begin)

    def wait(self) -> None:
        """Returns once the save that was begun is complete; raises HeadshareError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def _begin(self, job: _Job, written: bool) -> None:
        def work() -> None:
            try:
                if not written:
                    self._write(job)
                self._commit(job)
            except BaseException as error:  # raised where the run comes by next
                self._failed = error

        self._thread = threading.Thread(target=work, name=f"checkpoint of step {job.step}")
        self._thread.start()

    def _write(self, job: _Job) -> None:
        """Writes this process's parts of the arrays; returns when all processes have."""
        with self._undone(job), together("write a checkpoint"), self._explained(job):
            me = jax.process_index()
            stored_tree.write(job.folder / ARRAYS, job.state, me)
            if job.frozen:
                stored_tree.write(self.folder / _frozen_name(job), job.frozen, me)

    def _commit(self, job: _Job) -> None:
        """The first process writes the document, and removes what need not be kept any longer."""
        stage, frozen = job.document["stage"], self._frozen[1] if self._frozen else {}
        with self._undone(job), together("complete a checkpoint"), self._explained(job):
            if jax.process_index() == 0:
                count = jax.process_count()
                if job.frozen:
                    name = _frozen_name(job)
                    frozen = {"folder": name, "seals": stored_tree.seals(self.folder / name, count)}
                document = job.document | {
                    "frozen_in": frozen,
                    "seals": stored_tree.seals(job.folder / ARRAYS, count),
                }
                checkpoint_document.write(job.folder, document)
                self._known[job.step], self.newest = document, job.step
                self._prune()
        self.newest = job.step
        if job.frozen:
            self._frozen = stage, frozen

    @contextmanager
    def _undone(self, job: _Job) -> Iterator[None]:
        """Removes what a save that fails has written, if the storage can be reached."""
        try:
            yield
        except Exception as error:
            if jax.process_index() == 0 and not isinstance(error, TryAgain):
                with suppress(Exception):
                    _remove(job.folder)
            raise

    @contextmanager
    def _explained(self, job: _Job) -> Iterator[None]:
        try:
            yield
        except TryAgain:
            raise
        except Exception as error:  # each storage has its own
            refused = storage.refusal_at(error, job.folder, "it")
            if isinstance(refused, TryAgain):
                raise TryAgain(f"The checkpoint in {job.folder} was not written: {refused}") from error
            raise HeadshareError(
                f"A checkpoint in {self.folder} could not be written ({refused or _reason(error)}); earlier ones are "
                "intact."
            ) from error

    def _prune(self) -> None:
        """Removes checkpoints that are neither among the last ones nor the best, and frozen parameters of none."""
        measured = {step: found["perplexity"] for step, found in self._known.items() if found.get("perplexity")}
        kept = {*sorted(self._known)[-self.keep :], *([min(measured, key=measured.__getitem__)] if measured else [])}
        for step in set(self._known) - kept:
            _remove(self.folder / str(step))
            del self._known[step]
        for folder in self._unused_frozen():
            _remove(folder)

    def _unused_frozen(self) -> list[Path]:
        used = {found.get("frozen_in", {}).get("folder") for found in self._known.values()}
        return [
            path for path in _entries(self.folder) if re.fullmatch(r"frozen\.\d+", path.name) and path.name not in used
        ]

    def restore(self, abstract: Callable[[dict[str, Any]], Any]) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint that can be gone on from: its step, arrays and document; None if there is none at all.

        Newer ones, damaged or of another run, are named and removed: the run does their steps again. What was left by a
        save that was cut off is removed too.

        Args:
          abstract: gives, for a checkpoint's document, the tree of shapes, types and shardings to restore into. Raises
            HeadshareError for a checkpoint of another run.

        Raises:
          HeadshareError: there are checkpoints, but none can be gone on from.
          TryAgain: the storage cannot be reached.
        """
        reasons: dict[int, str] = {}
        found = None
        for step in self._whole_steps():
            try:
                with together("restore"):
                    found = step, *self._restored(self.folder / str(step), abstract)
                break
            except TryAgain:
                raise
            except HeadshareError as error:
                reasons[step] = textwrap.shorten(str(error), 160, placeholder=" ...").rstrip(".")
                logger.warning(
                    "The checkpoint of step %d cannot be used (%s); trying the one before.", step, reasons[step]
                )
        if found is None and reasons:
            newest = max(reasons)
            raise HeadshareError(
                f"None of the {len(reasons)} checkpoints in {self.folder} can be gone on from; step {newest}: "
                f"{reasons[newest]}."
            )
        with together("tidy checkpoints"):
            if jax.process_index() == 0:
                self._tidy(reasons)
        if found is not None:
            self.newest, document = found[0], found[2]
            self._frozen = (document["stage"], document["frozen_in"]) if document.get("frozen_in") else None
        return found

    def _whole_steps(self) -> list[int]:
        """Steps of the checkpoints that were written to their end, the newest first."""
        if jax.process_index() == 0:
            self._known = {}
            for path in _entries(self.folder):
                if path.name.isdecimal() and _is_whole(path):
                    self._known[int(path.name)] = {}
                    with suppress(HeadshareError):
                        self._known[int(path.name)] = _document(path)
        return sorted(json.loads(from_first("checkpoints", json.dumps(list(self._known)))), reverse=True)

    def _restored(self, folder: Path, abstract: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any]]:
        document = _document(folder)
        target = abstract(document)
        if not checkpoint_document.is_whole(folder):
            return checkpoints_before.restore(folder, document, target), document
        state = _load(StoredTree(folder / ARRAYS, document["seals"]), target["state"])
        frozen = target["frozen"]
        if frozen:
            where = document["frozen_in"]
            frozen = _load(StoredTree(self.folder / where["folder"], where["seals"]), frozen)
        return {"state": state, "frozen": frozen}, document

    def _tidy(self, unusable: Mapping[int, str]) -> None:
        """Removes checkpoints that cannot be gone on from, and what saves left that were cut off."""
        # Left where they are, they would count among the last that are kept, and be in the way of the same steps.
        for step in unusable:
            _remove(self.folder / str(step))
            self._known.pop(step, None)
        for path in _entries(self.folder):
            if (path.name.isdecimal() and int(path.name) not in self._known) or ".orbax-checkpoint-tmp" in path.name:
                logger.warning("Removing what a save that was cut off left of step %s.", path.name.partition(".")[0])
                _remove(path)
        for path in self._unused_frozen():
            _remove(path)


def _is_whole(folder: Path) -> bool:
    return checkpoint_document.is_whole(folder) or checkpoints_before.is_whole(folder)


def _document(folder: Path) -> dict[str, Any]:
    if checkpoint_document.is_whole(folder):
        return checkpoint_document.read(folder)
    return checkpoints_before.read(folder)


def _frozen_name(job: _Job) -> str:
    return f"frozen.{job.document['stage']}"


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if storage.is_folder(folder) else []


def _remove(folder: Path) -> None:
    """Removes a checkpoint, or what there is of one; its document first, without which it counts for nothing."""
    storage.remove_file(folder / checkpoint_document.DOCUMENT)
    storage.remove(folder)


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _parts(tree: Any, copies: bool) -> dict[str, Part]:
    """What this process writes of a tree's arrays: copies of them, or what gives their values later."""
    return {
        name: Part(
            array.shape,
            np.dtype(array.dtype),
            array.sharding.shard_shape(array.shape),
            [
                (tuple(cut.start or 0 for cut in shard.index), _values(shard.data, copies))
                for shard in array.addressable_shards
                if shard.replica_id == 0
            ],
        )
        for name, array in _named(tree).items()
    }


def _values(data: jax.Array, copies: bool) -> Callable[[], np.ndarray]:
    if not copies:
        # An array keeps what was once fetched of it; a copy of it is soon gone.
        return lambda: np.asarray(jnp.copy(data))
    # On a CPU, what is fetched is the device's own memory.
    values = np.array(data) if jax.default_backend() == "cpu" else np.asarray(data)
    return lambda: values


def _local_bytes(tree: Any) -> int:
    """Bytes that this process writes of a tree."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    )


def _load(stored: StoredTree, target: Any) -> Any:
    """Arrays in the places of a tree of shapes; each process reads what its devices hold.

    Raises:
      HeadshareError: an array is damaged, or not of the shape or type that is asked for.
    """

    def load(name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if (stored.shape(name), stored.dtype(name)) != (wanted.shape, np.dtype(wanted.dtype)):
            raise HeadshareError(f"{name} in {stored.folder} is not of this run's shape or type")
        places = wanted.sharding.addressable_devices_indices_map(wanted.shape)
        # Told apart by their text: slices themselves cannot be hashed.
        parts = {str(place): place for place in places.values()}
        values = dict(zip(parts, stored.read(name, list(parts.values())), strict=True))
        # Memory of its own, which a step may take over.
        arrays = [jax.device_put(values[str(place)], device, may_alias=False) for device, place in places.items()]
        return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, arrays)

    _, tree = jax.tree.flatten(target)
    return jax.tree.unflatten(tree, [load(name, wanted) for name, wanted in _named(target).items()])


def _reason(error: Exception) -> str:
    known = bucket_errors.system_error(error)
    return str(known.strerror) if known else textwrap.shorten(str(error), 160, placeholder=" ...")
