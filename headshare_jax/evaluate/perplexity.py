"""Perplexity by the standard protocol: one long token sequence, cut into fixed windows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headshare_jax.errors import HeadshareError
from headshare_jax.model.llama import Llama
from headshare_jax.model.mesh import batch_sharding, put, replicated, rows_of
from headshare_jax.output_head import head_logits
from headshare_jax.sharing import finite
from headshare_jax.typed import typed

# What is computed of tokens: an array, or several.
Results = TypeVar("Results")
# Tokens whose logits are in a device's memory at a time.
_HEAD_TOKENS = 256


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and the protocol it was measured by.

    Attributes:
      token_perplexity: exp of the mean negative log-likelihood of a scored token, in nats.
      word_perplexity: exp of the negative log-likelihood per whitespace-separated word, taking the scored tokens to
        have the whole text's words per token; None where the words were not counted.
      scored_tokens: number of tokens predicted.
      windows: number of windows run.
      seq_len: tokens in a window.
      stride: tokens from one window's start to the next.
      total_tokens: tokens in the text; what is left after the last whole window is not scored.
    """

    token_perplexity: float
    word_perplexity: float | None
    scored_tokens: int
    windows: int
    seq_len: int
    stride: int
    total_tokens: int

    @property
    def protocol(self) -> str:
        """The protocol in one sentence."""
        scored = (
            "every token but a window's first is scored"
            if self.stride == self.seq_len
            else f"each window scores the {self.stride} tokens new in it (the first: all but its first)"
        )
        windows = "1 window" if self.windows == 1 else f"{self.windows} windows"
        return (
            f"{self.total_tokens} tokens in one sequence, {windows} of {self.seq_len} tokens "
            f"at a stride of {self.stride}; {scored}; {self.scored_tokens} tokens scored"
        )


@typed
def perplexity(
    model: Llama,
    tokens: Sequence[int] | np.ndarray,
    *,
    seq_len: int = 2048,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    words: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Perplexity of a model on a text; windows run side by side on the mesh that the model lies on, if it is on one.

    Args:
      model: dense or shared.
      tokens: the whole text as one sequence of token ids.
      seq_len: tokens in a window; a shorter text is one window.
      stride: tokens from one window's start to the next; by default windows do not overlap.
      max_windows: run the first windows only.
      batch_size: windows run at a time; of a model on a mesh at least so many, a multiple of the mesh's rows.
      words: number of words in the text, for the word perplexity.
      progress: called with the windows done and in all.

    Raises:
      HeadshareError: fewer than two tokens, one outside the vocabulary, or an impossible window, stride, number of
        windows or batch size.
      NotFinite: predictions that are NaN or infinite. A perplexity of finite ones that is beyond any float is infinite.

    Examples:
      >>> measured = hs.perplexity(model, tokens, seq_len=64, max_windows=4)
      >>> measured.scored_tokens
      252
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size < 2:
        raise HeadshareError(f"Perplexity needs a text of at least two tokens, not {tokens.size}.")
    vocab_size = model.config.vocab_size
    if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise HeadshareError(f"The text holds a token outside the model's vocabulary of {vocab_size}.")
    seq_len = min(seq_len, tokens.size)
    stride = seq_len if stride is None else stride
    if seq_len < 2:
        raise HeadshareError(f"A window must have at least 2 tokens (seq_len), not {seq_len}.")
    if batch_size < 1:
        raise HeadshareError(f"batch_size must be at least 1, not {batch_size}.")
    if not 1 <= stride <= seq_len:
        raise HeadshareError(f"The stride must be from 1 to seq_len ({seq_len}), not {stride}.")
    if max_windows is not None and max_windows < 1:
        raise HeadshareError(f"max_windows must be at least 1, not {max_windows}.")
    batch_size += -batch_size % rows_of(model.mesh)
    starts = np.arange(0, tokens.size - seq_len + 1, stride)[:max_windows]
    total, scored = 0.0, 0
    for begin in range(0, len(starts), batch_size):
        starts_b = starts[begin : begin + batch_size]
        # The last batch is filled up with rows of which nothing is scored, so that all batches have one shape.
        tokens_bt = np.zeros((batch_size, seq_len), np.int32)
        tokens_bt[: len(starts_b)] = tokens[starts_b[:, None] + np.arange(seq_len)]
        first_scored_b = np.full(batch_size, seq_len)
        first_scored_b[: len(starts_b)] = np.where(starts_b == 0, 1, max(1, seq_len - stride))
        nll_bt = np.asarray(next_token_scores(model, tokens_bt)[0], np.float64)
        # Column t holds the loss of the window's token t + 1.
        counted_bt = np.arange(1, seq_len)[None, :] >= first_scored_b[:, None]
        wrong = int(np.count_nonzero(~np.isfinite(nll_bt[counted_bt])))
        if wrong:
            raise finite.NotFinite(
                f"The model's perplexity is not finite: {wrong} of {counted_bt.sum()} predictions are NaN or infinite "
                f"in the windows from token {starts_b[0]} on; {finite.CAUSE}"
            )
        total += float(nll_bt[counted_bt].sum())
        scored += int(counted_bt.sum())
        progress(begin + len(starts_b), len(starts))
    mean = total / scored
    return Perplexity(
        token_perplexity=_exp(mean),
        word_perplexity=_exp(mean * tokens.size / words) if words else None,
        scored_tokens=scored,
        windows=len(starts),
        seq_len=seq_len,
        stride=stride,
        total_tokens=tokens.size,
    )


def next_token_scores(model: Llama, tokens_bt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How well every token but the first is predicted by those before it.

    Rows that the model's mesh does not divide are filled up. All processes of a mesh call it with the same rows.

    Returns:
      Negative log-likelihoods, float32 [B, T - 1], in nats; and whether each token is the most likely one, bool
      [B, T - 1].
    """
    batch, mesh = len(tokens_bt), model.mesh
    tokens_bt = np.pad(tokens_bt, ((0, -batch % rows_of(mesh)), (0, 0)))
    rows = jnp.asarray(tokens_bt) if mesh is None else put(tokens_bt, batch_sharding(mesh))
    nll_bt, greedy_bt = (np.asarray(scores)[:batch] for scores in scored(model, rows))
    return nll_bt, greedy_bt


@jax.jit
def scored(model: Llama, tokens_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scores of `next_token_scores`, whole on every device of a mesh that divides the rows."""
    head_vd = model.head_weights()

    def score(features_bpd: jax.Array, target_bp: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_bpv = head_logits(features_bpd, head_vd)
        chosen_bp = jnp.take_along_axis(logits_bpv, target_bp[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_bpv, axis=-1) - chosen_bp, jnp.argmax(logits_bpv, axis=-1) == target_bp

    nll_bt, greedy_bt = position_by_position(score, (model.features(tokens_bt)[:, :-1], tokens_bt[:, 1:]), model.mesh)
    return nll_bt, greedy_bt


def position_by_position(
    function: Callable[..., Results], rows: Sequence[jax.Array], mesh: Mesh | None, tokens: int = _HEAD_TOKENS
) -> Results:
    """What a function gives for rows [B, T, ...], of which it is given a few positions at a time, [B, p, ...].

    Every device has its own rows of them, at most so many tokens. Results, [B, T, ...], are whole on every device.
    """
    batch, length = rows[0].shape[:2]
    positions = min(length, max(1, tokens * rows_of(mesh) // batch))

    def chunked(row_bt: jax.Array) -> jax.Array:
        filled_bt = jnp.pad(row_bt, [(0, 0), (0, -length % positions)] + [(0, 0)] * (row_bt.ndim - 2))
        return filled_bt.reshape(batch, -1, positions, *row_bt.shape[2:]).swapaxes(0, 1)

    def whole(chunks: jax.Array) -> jax.Array:
        out_bt = chunks.swapaxes(0, 1).reshape(batch, -1, *chunks.shape[3:])[:, :length]
        return out_bt if mesh is None else jax.lax.with_sharding_constraint(out_bt, replicated(mesh))

    found: Results = jax.lax.map(lambda chunk: function(*chunk), tuple(map(chunked, rows)))
    return jax.tree.map(whole, found)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
