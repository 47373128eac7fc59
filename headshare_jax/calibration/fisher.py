"""What predictions depend on: gradients by every layer's attention output, layer by layer from a weight source."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration import streams
from headshare_jax.calibration.streams import Weights
from headshare_jax.config import LlamaConfig
from headshare_jax.model.layer import rms_norm
from headshare_jax.model.mesh import batch_sharding, replicated, rows_of
from headshare_jax.model.place import place
from headshare_jax.output_head import head_logits, normalized_rows
from headshare_jax.sharing.source import WeightSource

# Tokens whose logits are in a device's memory at a time.
_HEAD_TOKENS = 256


@partial(jax.jit, static_argnames=("config", "mesh"))
def _backward(
    config: LlamaConfig, weights: Weights, x_btd: jax.Array, gradient_btd: jax.Array, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Gradients behind a layer's attention and before the layer, from its input and the gradient behind it."""
    middle_btd, through_attention = jax.vjp(lambda x: streams.advance(config, weights, x, "attention", mesh), x_btd)
    _, through_mlp = jax.vjp(lambda x: streams.advance(config, weights, x, "mlp", mesh), middle_btd)
    (middle_gradient_btd,) = through_mlp(gradient_btd)
    before_btd = through_attention(middle_gradient_btd)[0]
    return streams.on_rows(middle_gradient_btd, mesh), streams.on_rows(before_btd, mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _head_gradient(
    config: LlamaConfig, mesh: Mesh, final_norm_d: jax.Array, head_vd: jax.Array, x_btd: jax.Array, keys_bt: jax.Array
) -> jax.Array:
    """Gradient of the log-probability of tokens drawn by the model itself, by the stream before the final norm."""
    everywhere, rows = replicated(mesh).spec, batch_sharding(mesh).spec
    specs = (everywhere, everywhere, rows, rows)

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    def of_windows(final_norm_d: jax.Array, head_vd: jax.Array, x_btd: jax.Array, keys_bt: jax.Array) -> jax.Array:
        def of_token(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            x_d, key = row
            logits_v, through_logits = jax.vjp(
                lambda x_d: head_logits(rms_norm(x_d, final_norm_d, config.rms_norm_eps), head_vd), x_d
            )
            drawn_v = jax.nn.one_hot(jax.random.categorical(key, logits_v), logits_v.size, dtype=jnp.float32)
            return through_logits(drawn_v - jax.nn.softmax(logits_v))[0]

        tokens = (x_btd.reshape(-1, x_btd.shape[-1]), keys_bt.ravel())
        return jax.lax.map(of_token, tokens, batch_size=_HEAD_TOKENS).reshape(x_btd.shape)

    gradient_btd: jax.Array = of_windows(final_norm_d, head_vd, x_btd, keys_bt)
    return gradient_btd


def _draw_keys(seed: int, windows: slice, seq_len: int, rows: int) -> jax.Array:
    """Keys of a draw for every token, [W, T], W a multiple of the rows; a window's do not depend on the others."""
    last = windows.stop + (windows.start - windows.stop) % rows
    key_w = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(windows.start, last))
    return jax.vmap(partial(jax.random.split, num=seq_len))(key_w)


@dataclass(frozen=True)
class LayerGradients:
    """A layer on the way back through the model.

    Attributes:
      layer: its index.
      weights: its parameters, as of `streams.layer_weights`.
      before: what it reads of the residual stream.
      gradients: those by its attention's output; both are there until the next layer is asked for.
    """

    layer: int
    weights: Weights
    before: streams.Stream
    gradients: streams.Stream


def layers_backward(
    source: WeightSource,
    windows_wt: np.ndarray,
    parts: Sequence[slice],
    states_lwtd: np.ndarray,
    mesh: Mesh,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[LayerGradients]:
    """The layers from the last to the first, each with the gradients that `attention_gradients` describes.

    Args:
      source: the model; one layer's parameters are in memory at a time.
      windows_wt: int32 [W, T].
      parts: all windows, in the batches that are run at a time.
      states_lwtd: float32 [L, W, T, D], room for what every layer reads, as of `layer_room`.
      mesh: devices.
      seed: of the draws.
      progress: called with the layers done, forward and backward, and in all.

    Raises:
      HeadshareError: the disk is full.
    """
    config, total = source.config, 2 * source.config.num_layers
    seq_len, embedded = windows_wt.shape[1], streams.embedded(source, windows_wt, parts, mesh)
    with embedded as stream, streams.copied(stream) as gradients:
        layers = [streams.Stream(states_wtd, stream.windows, mesh) for states_wtd in states_lwtd]
        for layer in range(config.num_layers):
            weights = streams.layer_weights(source, layer, mesh)
            for part in parts:
                layers[layer][part] = x_btd = stream[part]
                stream[part] = streams.through_layer(config, weights, x_btd, mesh)
            progress(layer + 1, total)
        final_norm_d = jnp.asarray(source.read("final_norm_d"), jnp.float32)
        head_vd = output_head(source, mesh)
        for part in parts:
            keys_bt = _draw_keys(seed, part, seq_len, rows_of(mesh))
            stream[part] = _head_gradient(config, mesh, final_norm_d, head_vd, stream[part], keys_bt)
        del head_vd
        for layer in reversed(range(config.num_layers)):
            weights = streams.layer_weights(source, layer, mesh)
            for part in parts:
                gradients[part], stream[part] = _backward(config, weights, layers[layer][part], stream[part], mesh)
            yield LayerGradients(layer, weights, layers[layer], gradients)
            progress(total - layer, total)


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
    mesh = mesh or streams.calibration_mesh()
    parts = streams.batches(slice(0, len(windows_wt)), batch_tokens, windows_wt.shape[1], rows_of(mesh))
    with layer_room(source.config, windows_wt) as states_lwtd:
        for each in layers_backward(source, windows_wt, parts, states_lwtd, mesh, seed=seed, progress=progress):
            # What the layer read is needed no more: its gradients take that place.
            each.before.states_wtd[:] = each.gradients.states_wtd
        yield states_lwtd


@contextmanager
def layer_room(config: LlamaConfig, windows_wt: np.ndarray) -> Iterator[np.ndarray]:
    """Room for hidden states of every layer, float32 [L, W, T, D], in a temporary file that goes with the block.

    Raises:
      HeadshareError: the disk is full.
    """
    windows, seq_len = windows_wt.shape
    shape = (config.num_layers, windows, seq_len, config.hidden_size)
    # Room is taken at once, so that a full disk is an error here.
    parts = (np.zeros((1, *shape[2:]), np.float32) for _ in range(shape[0] * shape[1]))
    with streams.on_disk(parts, shape[2:]) as states:
        yield states.reshape(shape)


def output_head(source: WeightSource, mesh: Mesh) -> jax.Array:
    """Weights of the output head, float32 [V, D], whole on each device of a mesh, all of whose processes call it."""
    name = "embed_vd" if source.config.tie_word_embeddings else "head_vd"
    return _whole_head(place(source, [name], mesh, "float32")[name], source.config.normalize_head, mesh)


@partial(jax.jit, static_argnames=("normalize", "mesh"))
def _whole_head(head_vd: jax.Array, normalize: bool, mesh: Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(normalized_rows(head_vd) if normalize else head_vd, replicated(mesh))
