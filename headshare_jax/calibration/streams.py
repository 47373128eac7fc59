"""Calibration text run through a model block by block, from any weight source, one layer in memory at a time.

Every device has the weights of a layer; windows of text are cut among them, and sums over tokens come out whole.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.model.attention import Window, attend
from headshare_jax.model.layer import attention_output, head_outputs, layer_kinds, mlp_output, mlp_units
from headshare_jax.model.mesh import batch_sharding, make_mesh, replicated
from headshare_jax.model.reading import Held
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
    return make_mesh((-1, 1, 1), jax.local_devices() if devices is None else devices)


def layer_weights(source: WeightSource, layer: int, mesh: Mesh | None = None) -> Weights:
    """One layer's parameters by name, in float32 whatever the stored type; shapes as `parameters.slice_shape` has.

    What the layer is beside them is there too (`layer.layer_kinds`). All are whole on every device of the mesh; without
    one, on the default device.
    """
    weights = {name: whole(source.read(name, layer), mesh) for name in layered_names(source.config)}
    return weights | {name: whole(kinds_l[layer], mesh, None) for name, kinds_l in layer_kinds(source.config).items()}


def whole(
    value: jax.typing.ArrayLike, mesh: Mesh | None, dtype: jax.typing.DTypeLike | None = jnp.float32
) -> jax.Array:
    """A value on every device of a mesh, in float32 or, for None, its own type."""
    value = jnp.asarray(value, dtype)
    return value if mesh is None else jax.device_put(value, replicated(mesh))


def cut(windows_w: np.ndarray, mesh: Mesh) -> jax.Array:
    """Windows, [W, ...], cut among the devices of a mesh; where they cannot be, whole on each."""
    return jax.device_put(windows_w, window_sharding(len(windows_w), mesh))


def window_sharding(count: int, mesh: Mesh) -> NamedSharding:
    return batch_sharding(mesh) if count % mesh.size == 0 else replicated(mesh)


def output_weight(weights: Weights, block: str) -> jax.Array:
    """The linear map that ends a block, float32 [I, D]: I is N * H or F."""
    weight = weights[OUTPUT[block]]
    return weight.reshape(-1, weight.shape[-1])


@partial(jax.jit, static_argnames=("config", "block"))
def run_block(config: LlamaConfig, weights: Weights, x_btd: jax.Array, block: str) -> tuple[jax.Array, jax.Array]:
    """What a block adds to the residual stream, and the stream behind it, [B, T, D] each."""
    with jax.default_matmul_precision("highest"):
        added_btd = block_output(weights, features(config, weights, x_btd, block), block)
        return added_btd, x_btd + added_btd


def advance(config: LlamaConfig, weights: Weights, x_btd: jax.typing.ArrayLike, block: str) -> jax.Array:
    """The residual stream behind a block, [B, T, D]."""
    return run_block(config, weights, x_btd, block)[1]


def through_layer(config: LlamaConfig, weights: Weights, x_btd: jax.Array) -> jax.Array:
    """The residual stream behind a layer, [B, T, D]."""
    for block in BLOCKS:
        x_btd = advance(config, weights, x_btd, block)
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
    angles = rotary_angles(config, jnp.arange(x_btd.shape[1], dtype=jnp.int32)[None])
    return head_outputs(config, Held(weights), x_btd, angles, _windowed)[0]


def _windowed(q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, window: Window) -> tuple[jax.Array, None]:
    return attend(q_btnh, k_btkh, v_btkh, window=window), None


@contextmanager
def on_disk(parts: Iterable[np.ndarray], folder: Path | None = None) -> Iterator[np.ndarray]:
    """Hidden states in a temporary file, so that memory does not grow with the text; the file goes with the block.

    Args:
      parts: arrays [w, T, D], the first windows first.
      folder: where the file lies; by default where the system has its temporary files.

    Yields:
      float32 [W, T, D], mapped from the file, to read and write.

    Raises:
      HeadshareError: the disk is full.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
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
        yield np.memmap(file, np.float32, "r+", shape=(windows, *part.shape[1:]))


def embedded(source: WeightSource, windows_wt: np.ndarray) -> Iterator[np.ndarray]:
    """What the first layer reads of every window, float32 [1, T, D]."""
    embed_vd = source.read("embed_vd")
    return (np.asarray(embed_vd[window_t], np.float32)[None] for window_t in windows_wt)


def batches(windows: slice, tokens: int, seq_len: int, devices: int = 1) -> Iterator[slice]:
    """The windows in batches of at most `tokens` tokens a device, at least one window.

    As many windows as the devices can share evenly come first; the others, fewer than the devices, are whole on each.
    """
    step = max(1, tokens // seq_len)
    even = windows.stop - (windows.stop - windows.start) % devices
    for begin, end, size in ((windows.start, even, step * devices), (even, windows.stop, step)):
        yield from (slice(start, min(start + size, end)) for start in range(begin, end, size))
