"""How far one model's predictions are from another's on a text: layer by layer from disk, or both models on a mesh."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration import streams
from headshare_jax.calibration.fisher import output_head
from headshare_jax.errors import HeadshareError
from headshare_jax.evaluate.perplexity import position_by_position
from headshare_jax.model.layer import rms_norm
from headshare_jax.model.llama import Llama
from headshare_jax.model.mesh import batch_sharding, put, rows_of
from headshare_jax.output_head import head_logits
from headshare_jax.sharing.finite import NotFinite
from headshare_jax.sharing.source import WeightSource


@dataclass(frozen=True)
class Agreement:
    """Two models' predictions on the same windows of text; every token but a window's first is predicted.

    Attributes:
      before: perplexity of the model that is compared with, such as the dense one.
      after: perplexity of the other.
      ratio_error: standard error of `ratio` over windows; None for a single window.
      kl: mean Kullback-Leibler divergence of the predictions, in nats per token, from the first model's to the other's.
      same_choice: part of the tokens for which both find the same token most likely.
      windows, seq_len: windows of text, and tokens in each.
    """

    before: float
    after: float
    ratio_error: float | None
    kl: float
    same_choice: float
    windows: int
    seq_len: int

    @property
    def ratio(self) -> float:
        """`after` divided by `before`."""
        return self.after / self.before

    def __str__(self) -> str:
        error = "" if self.ratio_error is None else f" ± {self.ratio_error:.3f}"
        return (
            f"perplexity {_digits(self.before)} -> {_digits(self.after)} ({_digits(self.ratio)}x{error}), "
            f"KL {self.kl:.3f} nats, the same first choice in {self.same_choice:.1%}"
        )


def agreement(
    first: WeightSource,
    second: WeightSource,
    windows_wt: np.ndarray,
    *,
    batch_tokens: int = 2048,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Agreement:
    """Compares the predictions of two models with the same vocabulary.

    One layer's weights are in memory at a time, and both output heads; hidden states lie in temporary files. Models
    that lie on one mesh run there, windows side by side; all processes of the mesh call it with the same windows.

    Args:
      first: the model to compare with, such as the dense one.
      second: the other, such as a `SharedView` of it.
      windows_wt: int32 [W, T], the text in windows of at least two tokens.
      batch_tokens: tokens run at a time on a device.
      mesh: devices, over which windows and each layer's weights are cut; by default all of this process.
      progress: called with the steps done and in all.

    Raises:
      HeadshareError: vocabularies of different sizes, too few tokens, one outside the vocabulary, predictions that are
        not finite, or no room for the hidden states.

    Examples:
      >>> found = hs.agreement(model, shared, windows)
      >>> found.ratio > 1, found.windows
      (True, 12)
    """
    vocab_size = first.config.vocab_size
    if second.config.vocab_size != vocab_size:
        raise HeadshareError(
            f"Models with vocabularies of {vocab_size} and {second.config.vocab_size} tokens do not predict the same "
            "things; compare two with one vocabulary."
        )
    if windows_wt.ndim != 2 or windows_wt.shape[0] < 1 or windows_wt.shape[1] < 2:
        raise HeadshareError(f"Models are compared on windows of at least two tokens, not {list(windows_wt.shape)}.")
    if windows_wt.min() < 0 or windows_wt.max() >= vocab_size:
        raise HeadshareError(f"The text holds a token outside the models' vocabulary of {vocab_size}.")
    if isinstance(first, Llama) and isinstance(second, Llama) and first.mesh is not None:
        sums_wc = _sums_on_mesh(first, second, windows_wt, first.mesh, batch_tokens, progress)
    else:
        sums_wc = _sums_by_layers(first, second, windows_wt, mesh or streams.calibration_mesh(), batch_tokens, progress)
    windows, seq_len = windows_wt.shape
    return _agreement(sums_wc / (seq_len - 1), windows, seq_len)


def _sums_on_mesh(
    first: Llama,
    second: Llama,
    windows_wt: np.ndarray,
    mesh: Mesh,
    batch_tokens: int,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """Of every window, float64 [W, 4]: sums over its tokens of what `_of_token` gives."""
    windows, seq_len = windows_wt.shape
    batch = max(1, batch_tokens // seq_len) * rows_of(mesh)
    sums = []
    for begin in range(0, windows, batch):
        tokens_bt = np.asarray(windows_wt[begin : begin + batch], np.int32)
        filled_bt = np.pad(tokens_bt, ((0, batch - len(tokens_bt)), (0, 0)))
        found_btc = compared_models(first, second, put(filled_bt, batch_sharding(mesh)))
        sums.append(np.asarray(found_btc)[: len(tokens_bt)].sum(axis=1, dtype=np.float64))
        progress(min(begin + batch, windows), windows)
    return np.concatenate(sums)


@jax.jit
def compared_models(first: Llama, second: Llama, tokens_bt: jax.Array) -> jax.Array:
    """What `_compared` gives of two models on a mesh."""
    mesh = first.mesh
    assert mesh is not None
    with jax.default_matmul_precision("highest"):
        states = tuple(model.features(tokens_bt).astype(jnp.float32) for model in (first, second))
        heads = tuple(model.head_weights().astype(jnp.float32) for model in (first, second))
        return _compared(heads, states, tokens_bt[:, 1:], mesh)


def _sums_by_layers(
    first: WeightSource,
    second: WeightSource,
    windows_wt: np.ndarray,
    mesh: Mesh,
    batch_tokens: int,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """The same, with one layer of the models in memory at a time."""
    windows, seq_len = windows_wt.shape
    parts = streams.batches(slice(0, windows), batch_tokens, seq_len, rows_of(mesh))
    layers = [model.config.num_layers for model in (first, second)]
    total = sum(layers) + len(parts)
    with (
        _final_states(first, windows_wt, parts, mesh, lambda done: progress(done, total)) as one,
        _final_states(second, windows_wt, parts, mesh, lambda done: progress(layers[0] + done, total)) as other,
    ):
        heads = tuple(output_head(model, mesh) for model in (first, second))
        sums = []
        for number, part in enumerate(parts, 1):
            targets_bt = streams.cut(np.asarray(windows_wt[part, 1:], np.int32), mesh)
            found_btc = np.asarray(_compared(heads, (one[part], other[part]), targets_bt, mesh))
            sums.append(found_btc[: part.stop - part.start].sum(axis=1, dtype=np.float64))
            progress(sum(layers) + number, total)
    return np.concatenate(sums)


@contextmanager
def _final_states(
    source: WeightSource,
    windows_wt: np.ndarray,
    parts: Sequence[slice],
    mesh: Mesh,
    progress: Callable[[int], None],
) -> Iterator[streams.Stream]:
    """The residual stream behind the last layer, normalised."""
    config, norm_d = source.config, jnp.asarray(source.read("final_norm_d"), jnp.float32)
    with streams.embedded(source, windows_wt, parts, mesh) as stream:
        for layer in range(config.num_layers):
            weights = streams.layer_weights(source, layer, mesh)
            for part in parts:
                stream[part] = streams.through_layer(config, weights, stream[part], mesh)
            progress(layer + 1)
        for part in parts:
            stream[part] = rms_norm(stream[part], norm_d, config.rms_norm_eps)
        yield stream


@partial(jax.jit, static_argnames="mesh")
def _compared(
    heads: tuple[jax.Array, ...], states: tuple[jax.Array, ...], targets_bt: jax.Array, mesh: Mesh
) -> jax.Array:
    """What `_of_token` gives for every token but a window's first, float32 [B, T - 1, 4], whole on every device."""

    def compare(first_bpd: jax.Array, second_bpd: jax.Array, target_bp: jax.Array) -> jax.Array:
        return jax.vmap(jax.vmap(partial(_of_token, heads)))((first_bpd, second_bpd), target_bp)

    with jax.default_matmul_precision("highest"):
        return position_by_position(compare, (*(each_btd[:, :-1] for each_btd in states), targets_bt), mesh)


def _of_token(heads: tuple[jax.Array, ...], rows: tuple[jax.Array, ...], target: jax.Array) -> jax.Array:
    """Both models' losses, the divergence, and whether the first choices are equal, float32 [4]."""
    first_v, second_v = (jax.nn.log_softmax(head_logits(row, head)) for row, head in zip(rows, heads, strict=True))
    divergence = jnp.sum(jnp.exp(first_v) * (first_v - second_v))
    same = jnp.argmax(first_v) == jnp.argmax(second_v)
    return jnp.stack([-first_v[target], -second_v[target], divergence, same.astype(jnp.float32)])


def _agreement(means_wc: np.ndarray, windows: int, seq_len: int) -> Agreement:
    """The figures from every window's means."""
    wrong = np.flatnonzero(~np.isfinite(means_wc).all(axis=0))
    if len(wrong):
        what = ("first model's", "other model's", "two models'", "two models'")[wrong[0]]
        raise NotFinite(f"The {what} predictions on this text are not finite; check its weights.")
    before, after, kl, same = (float(mean) for mean in means_wc.mean(axis=0))
    difference_w = means_wc[:, 1] - means_wc[:, 0]
    error = float(difference_w.std(ddof=1)) / math.sqrt(windows) if windows > 1 else None
    ratio = _exp(after - before)
    return Agreement(
        before=_exp(before),
        after=_exp(after),
        ratio_error=None if error is None else ratio * error,
        kl=max(kl, 0.0),
        same_choice=same,
        windows=windows,
        seq_len=seq_len,
    )


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _digits(value: float) -> str:
    """Three decimals of small numbers, fewer of large ones."""
    return f"{value:,.3f}" if value < 100 else f"{value:,.0f}"
