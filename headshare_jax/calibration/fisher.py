"""What predictions depend on: gradients by every layer's attention output, layer by layer from a weight source."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration import streams
from headshare_jax.calibration.streams import Weights
from headshare_jax.config import LlamaConfig
from headshare_jax.model.attention import attend
from headshare_jax.model.layer import attention_output, rms_norm
from headshare_jax.model.mesh import batch_sharding, replicated, rows_of
from headshare_jax.model.place import place
from headshare_jax.model.stacks import Held
from headshare_jax.output_head import drawn, head_logits, normalized_rows
from headshare_jax.parameters import pool_name
from headshare_jax.sharing.source import WeightSource

# Tokens whose logits are in a device's memory at a time.
_HEAD_TOKENS = 256
# What is wanted of a batch on the way back through a layer.
Wanted = TypeVar("Wanted")


class Heads(NamedTuple):
    """What a layer's heads do to predictions.

    Attributes:
      outputs_btnh: [B, T, N, H].
      gradients_btnh: by outputs, likewise.
      queries_btnh: turned, likewise.
      by_queries_btnh: gradients by these.
    """

    outputs_btnh: jax.Array
    gradients_btnh: jax.Array
    queries_btnh: jax.Array
    by_queries_btnh: jax.Array


def layer_backward(
    config: LlamaConfig, weights: Weights, x_btd: jax.Array, gradient_btd: jax.Array, mesh: Mesh
) -> tuple[jax.Array, jax.Array, Heads]:
    """Inside of a program: gradients before a layer and behind its attention, from what it reads and the one behind it.

    And what its heads do; a program drops what it does not use.
    """
    with jax.default_matmul_precision("highest"):

        def heads(x_btd: jax.Array, added_btnh: jax.Array) -> tuple[jax.Array, jax.Array]:
            # What is added to queries is zeros, and tells the gradient by them.
            return streams.heads_by(
                config,
                weights,
                x_btd,
                lambda q_btnh, k_btkh, v_btkh, window: (
                    attend(q_btnh + added_btnh, k_btkh, v_btkh, window=window),
                    q_btnh,
                ),
            )

        count, _, width = weights[pool_name("q")].shape
        nothing_btnh = jnp.zeros((*x_btd.shape[:2], count, width), x_btd.dtype)
        z_btnh, through_heads, q_btnh = jax.vjp(heads, x_btd, nothing_btnh, has_aux=True)
        added_btd, through_output = jax.vjp(lambda z_btnh: attention_output(Held(weights), z_btnh), z_btnh)
        _, through_mlp = jax.vjp(lambda x: streams.advance(config, weights, x, "mlp", mesh), x_btd + added_btd)
        (middle_btd,) = through_mlp(gradient_btd)
        (by_outputs_btnh,) = through_output(middle_btd)
        by_stream_btd, by_queries_btnh = through_heads(by_outputs_btnh)
        return middle_btd + by_stream_btd, middle_btd, Heads(z_btnh, by_outputs_btnh, q_btnh, by_queries_btnh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _backward(
    config: LlamaConfig, weights: Weights, x_btd: jax.Array, gradient_btd: jax.Array, there_b: jax.Array, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """A `Backward`: gradients before a layer and behind its attention; zeros in windows that are not there."""
    before_btd, middle_btd, _ = layer_backward(config, weights, x_btd, gradient_btd, mesh)
    return streams.on_rows(before_btd, mesh), streams.on_rows(middle_btd, mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def head_gradient(
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
            drawn_v = jax.nn.one_hot(drawn(key, logits_v), logits_v.size, dtype=jnp.float32)
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


# Runs a layer backwards: from its weights, what it reads, the gradient behind it, and which windows are there, as of
# `streams.there`, to the gradient before it and what is wanted besides.
Backward = Callable[[LlamaConfig, Weights, jax.Array, jax.Array, jax.Array, Mesh], tuple[jax.Array, Wanted]]


@dataclass(frozen=True)
class LayerBack(Generic[Wanted]):
    """A layer on the way back through the model.

    Attributes:
      layer: its index.
      before: what it reads of the residual stream; there until the next layer is asked for.
      wanted: of every batch, what running it backwards gave.
    """

    layer: int
    before: streams.Stream
    wanted: list[Wanted]


def layers_backward(
    source: WeightSource,
    windows_wt: np.ndarray,
    parts: Sequence[slice],
    states_lwtd: np.ndarray,
    mesh: Mesh,
    backward: Backward[Wanted],
    *,
    known: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[LayerBack[Wanted]]:
    """The layers from the last to the first, run backwards from the gradients that `attention_gradients` describes.

    Args:
      source: the model; one layer's parameters are in memory at a time.
      windows_wt: int32 [W, T].
      parts: all windows, in the batches that are run at a time.
      states_lwtd: float32 [L + 1, W, T, D], room for what every layer reads and what the last gives, as of
        `layer_room`; the latter is overwritten.
      mesh: devices of this process.
      backward: how a layer is run; what it gives for all windows is in memory, of two layers at most.
      known: all this is there already.
      seed: of the draws.
      progress: called with the layers done, forward and backward, and in all.

    Raises:
      HeadshareError: the disk is full.
    """
    config, total = source.config, 2 * source.config.num_layers
    *layers, stream = (streams.Stream(states_wtd, np.arange(len(windows_wt)), mesh) for states_wtd in states_lwtd)
    if not known:
        _run_forward(source, windows_wt, parts, [*layers, stream], lambda layer: progress(layer, total))
    seq_len, final_norm_d = windows_wt.shape[1], jnp.asarray(source.read("final_norm_d"), jnp.float32)
    head_vd = output_head(source, mesh)
    for part in parts:
        keys_bt = _draw_keys(seed, part, seq_len, rows_of(mesh))
        stream[part] = head_gradient(config, mesh, final_norm_d, head_vd, stream[part], keys_bt)
    del head_vd
    for layer in reversed(range(config.num_layers)):
        weights, wanted = streams.layer_weights(source, layer, mesh), []
        for part in parts:
            states = layers[layer][part], stream[part], streams.there(part, mesh)
            stream[part], found = backward(config, weights, *states, mesh)
            wanted.append(found)
        yield LayerBack(layer, layers[layer], wanted)
        progress(total - layer, total)


def _run_forward(
    source: WeightSource,
    windows_wt: np.ndarray,
    parts: Sequence[slice],
    layers: Sequence[streams.Stream],
    told: Callable[[int], None],
) -> None:
    """Writes down what every layer reads, and what the last one gives."""
    mesh = layers[0].mesh
    with streams.embedded(source, windows_wt, parts, mesh) as stream:
        for part in parts:
            layers[0][part] = stream[part]
    for layer in range(source.config.num_layers):
        weights = streams.layer_weights(source, layer, mesh)
        for part in parts:
            layers[layer + 1][part] = streams.through_layer(source.config, weights, layers[layer][part], mesh)
        told(layer + 1)


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
        layers = layers_backward(source, windows_wt, parts, states_lwtd, mesh, _backward, seed=seed, progress=progress)
        for each in layers:
            # What the layer read is needed no more: its gradients take that place.
            for part, gradient_btd in zip(parts, each.wanted, strict=True):
                each.before[part] = gradient_btd
        yield states_lwtd[:-1]


@contextmanager
def layer_room(config: LlamaConfig, windows_wt: np.ndarray) -> Iterator[np.ndarray]:
    """Room for what every layer reads and what the last gives, in a temporary file that goes with the block.

    Yields:
      float32 [L + 1, W, T, D], mapped from it.

    Raises:
      HeadshareError: the disk is full.
    """
    windows, seq_len = windows_wt.shape
    shape = (config.num_layers + 1, windows, seq_len, config.hidden_size)
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
