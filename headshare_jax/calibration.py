"""Calibration text run through a model layer by layer: what its blocks compute, and what its predictions depend on.

Every device has the weights of a layer; windows of text are cut among them, and sums over tokens come out whole.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from headshare_jax import parameters
from headshare_jax.attention import attend
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.mesh import batch_sharding, make_mesh, replicated
from headshare_jax.modeling import _ACTIVATIONS, head_logits, normalized_rows
from headshare_jax.parameters import WeightSource
from headshare_jax.rope import rotary_angles, rotate, rotate_queries

# A layer adds to the residual stream what its two blocks give, one after the other; each ends in a linear map.
BLOCKS = ("attention", "mlp")
OUTPUT = {"attention": "o_pool_phd", "mlp": "down_lfd"}
_OUTPUT_BIAS = {"attention": "o_bias_ld", "mlp": "down_bias_ld"}
# Tokens whose logits are in a device's memory at a time.
_HEAD_TOKENS = 256
_LAYERLESS = ("embed_vd", "final_norm_d", "head_vd")


def calibration_windows(tokens: Sequence[int] | np.ndarray, count: int, seq_len: int, vocab_size: int) -> np.ndarray:
    """The text's first windows, int32 [count, seq_len].

    Args:
      tokens: the text as one sequence of token ids.
      count, seq_len: windows, and tokens in each.
      vocab_size: V.

    Raises:
      HeadshareError: the text is too short, a token is outside the vocabulary, or the windows have no tokens.
    """
    tokens = np.asarray(tokens)
    if count < 1 or seq_len < 2:
        raise HeadshareError(
            f"Calibration needs at least one window of two tokens, not {count} of {seq_len}; give it more tokens."
        )
    if tokens.size < count * seq_len:
        raise HeadshareError(
            f"The calibration text has {tokens.size} tokens, but {count} windows of {seq_len} need {count * seq_len}; "
            "give a longer text, or ask for fewer tokens."
        )
    windows = tokens[: count * seq_len].reshape(count, seq_len)
    if windows.dtype.kind not in "iu" or windows.min() < 0 or windows.max() >= vocab_size:
        raise HeadshareError(f"The calibration text holds a token outside the model's vocabulary of {vocab_size}.")
    return windows.astype(np.int32)


def tokens_digest(tokens: np.ndarray) -> str:
    """SHA-256 of token ids, int32 [...], as a model reads them: of how they are cut, too."""
    return f"sha256:{hashlib.sha256(json.dumps(tokens.shape).encode() + tokens.tobytes()).hexdigest()}"


def calibration_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices that share the work, by default all of this process: no other process waits for what one computes."""
    return make_mesh((-1, 1, 1), jax.local_devices() if devices is None else devices)


def layer_weights(source: WeightSource, layer: int, mesh: Mesh | None = None) -> dict[str, jax.Array]:
    """One layer's parameters by name, in float32 whatever the stored type; shapes as `parameters.slice_shape` has.

    They are whole on every device of the mesh; without one, on the default device.
    """
    names = (name for name in parameters.parameter_names(source.config) if name not in _LAYERLESS)
    return {name: _whole(source.read(name, layer), mesh) for name in names}


def _whole(value: jax.typing.ArrayLike, mesh: Mesh | None) -> jax.Array:
    """A parameter in float32 on every device of a mesh."""
    value = jnp.asarray(value, jnp.float32)
    return value if mesh is None else jax.device_put(value, replicated(mesh))


def cut(windows_w: np.ndarray, mesh: Mesh) -> jax.Array:
    """Windows, [W, ...], cut among the devices of a mesh; where they cannot be, whole on each."""
    return jax.device_put(windows_w, _window_sharding(len(windows_w), mesh))


def _window_sharding(count: int, mesh: Mesh) -> NamedSharding:
    return batch_sharding(mesh) if count % mesh.size == 0 else replicated(mesh)


def output_weight(weights: dict[str, jax.Array], block: str) -> jax.Array:
    """The linear map that ends a block, float32 [I, D]: I is N * H or F."""
    weight = weights[OUTPUT[block]]
    return weight.reshape(-1, weight.shape[-1])


def output_bias(weights: dict[str, jax.Array], block: str) -> jax.Array:
    """What a block adds besides the product with its output weight, float32 [D]."""
    bias = weights.get(_OUTPUT_BIAS[block])
    return jnp.zeros(weights["attn_norm_ld"].shape, jnp.float32) if bias is None else bias


@partial(jax.jit, static_argnames=("config", "block"))
def run_block(
    config: LlamaConfig, weights: dict[str, jax.Array], x_btd: jax.Array, block: str
) -> tuple[jax.Array, jax.Array]:
    """A block's output without its bias, and the residual stream behind it, [B, T, D] each."""
    with jax.default_matmul_precision("highest"):
        y_btd = features(config, weights, x_btd, block) @ output_weight(weights, block)
        return y_btd, x_btd + y_btd + output_bias(weights, block)[None, None]


def advance(config: LlamaConfig, weights: dict[str, jax.Array], x_btd: jax.typing.ArrayLike, block: str) -> jax.Array:
    """The residual stream behind a block, [B, T, D]."""
    return run_block(config, weights, x_btd, block)[1]


def through_layer(config: LlamaConfig, weights: dict[str, jax.Array], x_btd: jax.Array) -> jax.Array:
    """The residual stream behind a layer, [B, T, D]."""
    for block in BLOCKS:
        x_btd = advance(config, weights, x_btd, block)
    return x_btd


def residual_weights(x_btd: jax.Array) -> jax.Array:
    """w, [B, T, 1]: the reciprocal of each token's norm, since the next RMSNorm divides by it."""
    squares_bt1 = jnp.sum(jnp.square(x_btd), axis=-1, keepdims=True)
    return jax.lax.rsqrt(jnp.maximum(squares_bt1, np.finfo(np.float32).tiny))


def features(config: LlamaConfig, weights: dict[str, jax.Array], x_btd: jax.Array, block: str) -> jax.Array:
    """What a block's output weight multiplies, [B, T, I]: its head outputs side by side, or its gated MLP units."""
    if block == "attention":
        heads_btnh = head_outputs(config, weights, attention_input(config, weights, x_btd))
        return heads_btnh.reshape(*x_btd.shape[:2], -1)
    return mlp_units(config, weights, _rms_norm(config, x_btd, weights["mlp_norm_ld"]))


def attention_input(config: LlamaConfig, weights: dict[str, jax.Array], x_btd: jax.Array) -> jax.Array:
    """The residual stream as a layer's heads read it, [B, T, D]."""
    return _rms_norm(config, x_btd, weights["attn_norm_ld"])


def head_outputs(config: LlamaConfig, weights: dict[str, jax.Array], normed_btd: jax.Array) -> jax.Array:
    """Outputs of attention heads on normalised input, [B, T, N, H]; N and K are those of the weights.

    Args:
      weights: q, k and v weights [N or K, D, H], and their biases [N or K, H] where there are any.
      normed_btd: windows of text, each from position 0.
    """

    def project(letter: str) -> jax.Array:
        heads_btnh = jnp.einsum("btd,ndh->btnh", normed_btd, weights[f"{letter}_pool_pdh"])
        bias_nh = weights.get(f"{letter}_bias_ph")
        return heads_btnh if bias_nh is None else heads_btnh + bias_nh[None, None]

    positions_bt = jnp.broadcast_to(jnp.arange(normed_btd.shape[1], dtype=jnp.int32), normed_btd.shape[:2])
    angles = rotary_angles(config, positions_bt)
    q_btnh, k_btkh = rotate_queries(project("q"), *angles), rotate(project("k"), *angles)
    return attend(q_btnh, k_btkh, project("v"))


def mlp_units(config: LlamaConfig, weights: dict[str, jax.Array], normed_btd: jax.Array) -> jax.Array:
    """Gated units of the MLP on normalised input, [B, T, F]."""

    def project(name: str) -> jax.Array:
        units_btf = jnp.einsum("btd,df->btf", normed_btd, weights[f"{name}_ldf"])
        bias_f = weights.get(f"{name}_bias_lf")
        return units_btf if bias_f is None else units_btf + bias_f[None, None]

    return _ACTIVATIONS[config.hidden_act](project("gate")) * project("up")


def _rms_norm(config: LlamaConfig, x_btd: jax.Array, scale_d: jax.Array) -> jax.Array:
    mean_bt1 = jnp.mean(jnp.square(x_btd), axis=-1, keepdims=True)
    return x_btd * jax.lax.rsqrt(mean_bt1 + config.rms_norm_eps) * scale_d[None, None]


@partial(jax.jit, static_argnames="config")
def _backward(
    config: LlamaConfig, weights: dict[str, jax.Array], x_btd: jax.Array, gradient_btd: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients behind a layer's attention and before the layer, from its input and the gradient behind it."""
    middle_btd, through_attention = jax.vjp(lambda x: advance(config, weights, x, "attention"), x_btd)
    _, through_mlp = jax.vjp(lambda x: advance(config, weights, x, "mlp"), middle_btd)
    (middle_gradient_btd,) = through_mlp(gradient_btd)
    return middle_gradient_btd, through_attention(middle_gradient_btd)[0]


@partial(jax.jit, static_argnames=("config", "mesh"))
def _head_gradient(
    config: LlamaConfig, mesh: Mesh, final_norm_d: jax.Array, head_vd: jax.Array, x_btd: jax.Array, keys_bt: jax.Array
) -> jax.Array:
    """Gradient of the log-probability of tokens drawn by the model itself, by the stream before the final norm."""
    whole, rows = replicated(mesh).spec, _window_sharding(len(x_btd), mesh).spec
    of_windows = jax.shard_map(
        partial(_head_gradient_of_windows, config),
        mesh=mesh,
        in_specs=(whole, whole, rows, rows),
        out_specs=rows,
        check_vma=False,
    )
    gradient_btd: jax.Array = of_windows(final_norm_d, head_vd, x_btd, keys_bt)
    return gradient_btd


def _head_gradient_of_windows(
    config: LlamaConfig, final_norm_d: jax.Array, head_vd: jax.Array, x_btd: jax.Array, keys_bt: jax.Array
) -> jax.Array:
    def of_token(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_d, key = row

        def logits(x_d: jax.Array) -> jax.Array:
            return head_logits(_rms_norm(config, x_d[None, None], final_norm_d)[0, 0], head_vd)

        logits_v, through_logits = jax.vjp(logits, x_d)
        drawn_v = jax.nn.one_hot(jax.random.categorical(key, logits_v), logits_v.size, dtype=jnp.float32)
        return through_logits(drawn_v - jax.nn.softmax(logits_v))[0]

    tokens = (x_btd.reshape(-1, x_btd.shape[-1]), keys_bt.ravel())
    return jax.lax.map(of_token, tokens, batch_size=_HEAD_TOKENS).reshape(x_btd.shape)


def _draw_keys(seed: int, windows: slice, seq_len: int) -> jax.Array:
    """Keys of a draw for every token, [W, T]; a window's do not depend on the others."""

    def of_window(window: jax.Array) -> jax.Array:
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), window), seq_len)

    return jax.vmap(of_window)(jnp.arange(windows.start, windows.stop))


@contextmanager
def attention_gradients(
    source: WeightSource,
    windows_wt: np.ndarray,
    *,
    batch_tokens: int = 2048,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[np.ndarray]:
    """What predictions depend on: gradients by every layer's attention output, one drawn token a position.

    The next token of every position is drawn from the model's own distribution. For a small change d of an output,
    half the mean of (g d)^2 then is the change's KL divergence, as far as tokens do not act together: the Fisher
    information, one draw a token.

    Args:
      source: the model; one layer's parameters are in memory at a time.
      windows_wt: int32 [W, T].
      batch_tokens: tokens run at a time on a device.
      seed: of the draws.
      mesh: by default `calibration_mesh()`.
      progress: called with the layers done, forward and backward, and in all.

    Yields:
      float32 [L, W, T, D], mapped from a temporary file that goes with the block: gradients of the log-probability of
      all of a window's drawn tokens together.

    Raises:
      HeadshareError: the disk is full.
    """
    config, total = source.config, 2 * source.config.num_layers
    mesh = mesh or calibration_mesh()
    windows, seq_len = windows_wt.shape
    parts = list(batches(slice(0, windows), batch_tokens, seq_len, mesh.size))
    shape = (config.num_layers, windows, seq_len, config.hidden_size)
    with _mapped(shape) as states_lwtd, on_disk(embedded(source, windows_wt)) as x_wtd:
        for layer in range(config.num_layers):
            weights = layer_weights(source, layer, mesh)
            for part in parts:
                states_lwtd[layer, part] = x_wtd[part]
                x_wtd[part] = through_layer(config, weights, cut(x_wtd[part], mesh))
            progress(layer + 1, total)
        final_norm_d, head_vd = _whole(source.read("final_norm_d"), mesh), _whole(output_head(source), mesh)
        for part in parts:
            keys_bt = _draw_keys(seed, part, seq_len)
            x_wtd[part] = _head_gradient(config, mesh, final_norm_d, head_vd, cut(x_wtd[part], mesh), keys_bt)
        for layer in reversed(range(config.num_layers)):
            weights = layer_weights(source, layer, mesh)
            for part in parts:
                states_lwtd[layer, part], x_wtd[part] = _backward(
                    config, weights, cut(states_lwtd[layer, part], mesh), cut(x_wtd[part], mesh)
                )
            progress(total - layer, total)
        yield states_lwtd


def output_head(source: WeightSource) -> jax.Array:
    """Weights of the output head, float32 [V, D]."""
    head_vd = jnp.asarray(source.read("embed_vd" if source.config.tie_word_embeddings else "head_vd"), jnp.float32)
    return normalized_rows(head_vd) if source.config.normalize_head else head_vd


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
        with _told_when_full():
            for part in parts:
                file.write(np.ascontiguousarray(part, np.float32).data)
                windows += len(part)
            file.flush()
        yield np.memmap(file, np.float32, "r+", shape=(windows, *part.shape[1:]))


@contextmanager
def _mapped(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Room for a float32 array in a temporary file, taken at once, so that a full disk is an error here."""
    with tempfile.TemporaryFile() as file:
        with _told_when_full():
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
        yield np.memmap(file, np.float32, "r+", shape=shape)


@contextmanager
def _told_when_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HeadshareError(
            f"The hidden states of the calibration text find no room in temporary files ({error.strerror}); "
            "set TMPDIR to a folder with more room, or calibrate on fewer tokens."
        ) from error


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
