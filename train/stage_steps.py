"""The steps of a stage, kept close to one another: what the host does is done while the devices compute."""

import time
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding

from headshare_jax.model.mesh import batch_sharding
from headshare_jax.train import data
from headshare_jax.train.current import Current
from headshare_jax.train.placement import abstract_state
from headshare_jax.train.step import make_step


class StageSteps:
    """Runs the steps of the current stage. One may begin before the one before it has ended.

    The batch of the step after that lies on the devices by then. So they never wait for the host, unless it wants a
    state to evaluate or to save: that of a step is there only until the next begins.
    """

    def __init__(self, current: Current, done: int):
        """Goes on after so many steps of the stage."""
        task, recipe = current.task, current.task.recipe
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(current.context, task.mesh))
        self._current, self._step = current, make_step(current.context, state_sharding=shardings)
        sharding = batch_sharding(task.mesh, axis=1)
        shape = (recipe.accumulate, recipe.batch_size // recipe.accumulate, recipe.data.seq_len)
        batches = data.Batches(
            task.blocks, batch_size=recipe.batch_size, accumulate=recipe.accumulate, seed=recipe.seed + current.number
        )
        self._batches = batches.stream(done, current.stage.steps, rows=_local_rows(sharding, shape))
        self._place = partial(jax.make_array_from_process_local_data, sharding, global_shape=shape)
        self._next = self._placed()
        # When each step that has not ended was begun, and its metrics.
        self._running: list[tuple[float, dict[str, jax.Array]]] = []
        self._ended = 0.0

    @property
    def left(self) -> bool:
        """Whether there is a step that was not begun."""
        return self._next is not None

    def begin(self) -> bool:
        """Begins the next step; False if the stage has no more."""
        if self._next is None:
            return False
        began, current = time.perf_counter(), self._current
        current.state, metrics = self._step(current.state, current.frozen, current.teacher, *self._next)
        for value in metrics.values():
            value.copy_to_host_async()
        self._running.append((began, metrics))
        self._next = self._placed()
        return True

    def end(self) -> dict[str, float]:
        """Waits for the oldest step that was begun: its metrics, and the `seconds` since it began or the last ended."""
        began, metrics = self._running.pop(0)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        started, self._ended = max(began, self._ended), time.perf_counter()
        return values | {"seconds": self._ended - started}

    def _placed(self) -> tuple[jax.Array, ...] | None:
        parts = next(self._batches, None)
        return None if parts is None else tuple(self._place(part) for part in parts)


def _local_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    """Rows (axis 1) of a batch that this process's devices hold."""
    places = sharding.addressable_devices_indices_map(shape).values()
    return np.unique([np.arange(shape[1])[place[1]] for place in places if place is not None])
