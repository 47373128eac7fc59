"""Calibration text run through a model block by block, from any weight source, one layer in memory at a time.

On a mesh of devices, also of several processes, a layer lies as in training, windows of text are cut among the devices,
and sums over tokens come out whole.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.model.attention import Window, attend
from headshare_jax.model.embedding import look_up
from headshare_jax.model.layer import (
    Attend,
    Kept,
    attention_output,
    head_outputs,
    layer_kinds,
    mlp_output,
    mlp_units,
)
from headshare_jax.model.mesh import batch_sharding, make_mesh, put, replicated, rows_of
from headshare_jax.model.place import place, place_layer
from headshare_jax.model.stacks import Held
from headshare_jax.parameters import layered_names
from headshare_jax.rope import rotary_angles
from headshare_jax.sharing.source import WeightSource

# A layer adds to the residual stream what its two blocks give, one after the other; each ends in a linear map.
BLOCKS = ("attention", "mlp")
OUTPUT = {"attention": "o_pool_phd", "mlp": "down_lfd"}
# One layer's parameters by name, float32.
Weights = dict[str, jax.Array]


def calibration_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices that share the work, by default all of this process: no other process waits for what one computes."""
    return make_mesh((1, -1, 1), jax.local_devices() if devices is None else devices)


def layer_weights(source: WeightSource, layer: int, mesh: Mesh | None = None) -> Weights:
    """One layer's parameters by name, in float32 whatever the stored type; shapes as `parameters.slice_shape` has.

    What the layer is beside them is there too (`layer.layer_kinds`). Each device of the mesh has its part of them;
    without one, the default device has all.
    """
    mesh = mesh or calibration_mesh(jax.local_devices()[:1])
    kinds = {name: put(kinds_l[layer], replicated(mesh)) for name, kinds_l in layer_kinds(source.config).items()}
    return place_layer(source, layered_names(source.config), layer, mesh) | kinds


def cut(windows_w: np.ndarray, mesh: Mesh) -> jax.Array:
    """Windows, [B, ...], cut among the devices of a mesh, with zeros behind them where these need more."""
    missing = -len(windows_w) % rows_of(mesh)
    return put(np.pad(windows_w, [(0, missing)] + [(0, 0)] * (windows_w.ndim - 1)), batch_sharding(mesh))


def there(batch: slice, mesh: Mesh) -> jax.Array:
    """float32 [B], 1 for every window of a batch, and 0 for what `cut` adds to them."""
    return cut(np.ones(batch.stop - batch.start, np.float32), mesh)


def on_host(value: jax.Array, mesh: Mesh) -> np.ndarray:
    """A value that lies on a mesh, as a whole; of several processes all call it."""
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(jax.jit(lambda value: value, out_shardings=replicated(mesh))(value))


class Stream:
    """Hidden states of windows of text, float32 [W, T, D], in batches on a mesh.

    A batch, a slice of the windows, is read as `cut` gives it, and is written so. Each process of the mesh keeps what
    its devices have, in a temporary file; all of them read and write together, and batches are the same throughout.

    Attributes:
      mesh: the devices.
      windows: this process's windows, ascending.
      states_wtd: their hidden states, mapped from the file.
    """

    def __init__(self, states_wtd: np.ndarray, windows: np.ndarray, mesh: Mesh):
        self.mesh, self.windows, self.states_wtd = mesh, windows, states_wtd

    def __getitem__(self, batch: slice) -> jax.Array:
        count, *rest = batch.stop - batch.start, *self.states_wtd.shape[1:]
        count += -count % rows_of(self.mesh)

        def rows(part: tuple[slice, ...] | None) -> np.ndarray:
            assert part is not None
            found_btd = np.zeros((len(range(*part[0].indices(count))), *rest), np.float32)
            kept = self._kept(batch, part[0])
            found_btd[: kept.stop - kept.start] = self.states_wtd[kept]
            return found_btd

        return jax.make_array_from_callback((count, *rest), batch_sharding(self.mesh), rows)

    def __setitem__(self, batch: slice, x_btd: jax.Array) -> None:
        for shard in x_btd.addressable_shards:
            kept = self._kept(batch, shard.index[0])
            self.states_wtd[kept] = np.asarray(shard.data)[: kept.stop - kept.start]

    @contextmanager
    def beside(self, width: int) -> Iterator["Stream"]:
        """Another one of the same windows, so wide, of zeros; errors as of `on_disk`."""
        shape = (self.states_wtd.shape[1], width)
        with on_disk((np.zeros((1, *shape), np.float32) for _ in self.windows), shape) as states_wtd:
            yield Stream(states_wtd, self.windows, self.mesh)

    def _kept(self, batch: slice, rows: slice) -> slice:
        """Where some rows of a batch lie in the file, those apart that are none of its windows."""
        first = batch.start + (rows.start or 0)
        last = batch.stop if rows.stop is None else min(batch.start + rows.stop, batch.stop)
        begin, end = np.searchsorted(self.windows, (first, max(first, last)))
        return slice(int(begin), int(end))


@contextmanager
def embedded(source: WeightSource, windows_wt: np.ndarray, parts: Sequence[slice], mesh: Mesh) -> Iterator[Stream]:
    """What the first layer reads of windows of text, in batches; errors as of `on_disk`."""
    windows, shape = _own_windows(parts, mesh), (windows_wt.shape[1], source.config.hidden_size)
    embed_vd = place(source, ["embed_vd"], mesh)["embed_vd"]
    # Room is taken at once, so that a full disk is an error here.
    with on_disk((np.zeros((1, *shape), np.float32) for _ in windows), shape) as states_wtd:
        stream = Stream(states_wtd, windows, mesh)
        for part in parts:
            stream[part] = _looked_up(embed_vd, cut(np.asarray(windows_wt[part], np.int32), mesh), mesh)
        del embed_vd
        yield stream


@contextmanager
def copied(stream: Stream) -> Iterator[Stream]:
    """Another stream with the same states; errors as of `on_disk`."""
    states_wtd = stream.states_wtd
    with on_disk((state_td[None] for state_td in states_wtd), states_wtd.shape[1:]) as copied_wtd:
        yield Stream(copied_wtd, stream.windows, stream.mesh)


def _own_windows(parts: Sequence[slice], mesh: Mesh) -> np.ndarray:
    """Windows of all batches that lie on this process's devices, ascending."""
    own = set[int]()
    for part in parts:
        windows = range(part.start, part.stop)
        whole = len(windows) + -len(windows) % rows_of(mesh)
        places = batch_sharding(mesh).addressable_devices_indices_map((whole,)).values()
        own |= {window for place in places if place is not None for window in windows[place[0]]}
    return np.array(sorted(own), np.int64)


@partial(jax.jit, static_argnames="mesh")
def _looked_up(embed_vd: jax.Array, tokens_bt: jax.Array, mesh: Mesh) -> jax.Array:
    return on_rows(look_up(embed_vd, tokens_bt, "float32", batch_sharding(mesh)), mesh)


def on_rows(x_btd: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside of a program: an array that lies on a mesh as batches do."""
    return x_btd if mesh is None else jax.lax.with_sharding_constraint(x_btd, batch_sharding(mesh))


def output_weight(weights: Weights, block: str) -> jax.Array:
    """The linear map that ends a block, float32 [I, D]: I is N * H or F."""
    weight = weights[OUTPUT[block]]
    return weight.reshape(-1, weight.shape[-1])


@partial(jax.jit, static_argnames=("config", "block", "mesh"))
def run_block(
    config: LlamaConfig, weights: Weights, x_btd: jax.Array, block: str, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """What a block adds to the residual stream, and the stream behind it, [B, T, D] each, cut over a mesh as it is."""
    with jax.default_matmul_precision("highest"):
        added_btd = on_rows(block_output(weights, features(config, weights, x_btd, block), block), mesh)
        return added_btd, on_rows(x_btd + added_btd, mesh)


def advance(
    config: LlamaConfig, weights: Weights, x_btd: jax.typing.ArrayLike, block: str, mesh: Mesh | None = None
) -> jax.Array:
    """The residual stream behind a block, [B, T, D]."""
    return run_block(config, weights, x_btd, block, mesh)[1]


def through_layer(config: LlamaConfig, weights: Weights, x_btd: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """The residual stream behind a layer, [B, T, D]."""
    for block in BLOCKS:
        x_btd = advance(config, weights, x_btd, block, mesh)
    return x_btd


def residual_weights(x_btd: jax.Array) -> jax.Array:
    """w, [B, T, 1]: the reciprocal of each token's norm, since the next RMSNorm divides by it."""
    squares_bt1 = jnp.sum(jnp.square(x_btd), axis=-1, keepdims=True)
    return jax.lax.rsqrt(jnp.maximum(squares_bt1, np.finfo(np.float32).tiny))


def features(config: LlamaConfig, weights: Weights, x_btd: jax.Array, block: str) -> jax.Array:
    """What a block's output weight multiplies, [B, T, I]: its head outputs side by side, or its gated MLP units."""
    if block == "attention":
        return window_heads(config, weights, x_btd).reshape(*x_btd.shape[:2], -1)
    return mlp_units(config, Held(weights), x_btd).reshape(*x_btd.shape[:2], -1)


def block_output(weights: Weights, features_bti: jax.Array, block: str) -> jax.Array:
    """What a block adds to the residual stream, [B, T, D], from its features."""
    layer, shape = Held(weights), features_bti.shape[:2]
    if block == "mlp":
        return mlp_output(layer, features_bti.reshape(-1, features_bti.shape[-1])).reshape(*shape, -1)
    count, width, _ = weights[OUTPUT[block]].shape
    return attention_output(layer, features_bti.reshape(*shape, count, width))


def window_heads(config: LlamaConfig, weights: Weights, x_btd: jax.Array) -> jax.Array:
    """Head outputs [B, T, N, H] in windows of text, each from position 0; N and K are those of the weights.

    Args:
      config: the architecture.
      weights: the layer that the stream is in; its q, k and v weights [N or K, D, H] may be others', with their biases.
      x_btd: the residual stream before the layer.
    """
    return heads_by(config, weights, x_btd, _windowed)[0]


def heads_by(
    config: LlamaConfig, weights: Weights, x_btd: jax.Array, attention: Attend[Kept]
) -> tuple[jax.Array, Kept]:
    """The same by an attention of one's own, and what this keeps."""
    angles = rotary_angles(config, jnp.arange(x_btd.shape[1], dtype=jnp.int32)[None])
    return head_outputs(config, Held(weights), x_btd, angles, attention)


def _windowed(q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, window: Window) -> tuple[jax.Array, None]:
    return attend(q_btnh, k_btkh, v_btkh, window=window), None


@contextmanager
def on_disk(parts: Iterable[np.ndarray], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Hidden states in a temporary file, so that memory does not grow with the text; the file goes with the block.

    Args:
      parts: arrays [w, T, D], the first windows first; there may be none.
      shape: T and D.

    Yields:
      float32 [W, T, D], mapped from the file, to read and write.

    Raises:
      HeadshareError: the disk is full.
    """
    with tempfile.TemporaryFile() as file:
        windows = 0
        try:
            for part in parts:
                file.write(np.ascontiguousarray(part, np.float32).data)
                windows += len(part)
            file.flush()
        except OSError as error:
            raise HeadshareError(
                f"The hidden states of the calibration text find no room in temporary files ({error.strerror}); "
                "set TMPDIR to a folder with more room, or calibrate on fewer tokens."
            ) from error
        whole = (windows, *shape)
        yield np.memmap(file, np.float32, "r+", shape=whole) if windows else np.zeros(whole, np.float32)


def batches(windows: slice, tokens: int, seq_len: int, rows: int = 1) -> list[slice]:
    """The windows in batches of at most `tokens` tokens in each of a mesh's rows, at least one window."""
    step = max(1, tokens // seq_len) * rows
    return [slice(begin, min(begin + step, windows.stop)) for begin in range(windows.start, windows.stop, step)]
