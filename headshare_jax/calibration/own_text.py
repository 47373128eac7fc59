"""Text that a model writes itself, to calibrate on where no other is at hand."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.model.generate import Sampling, decode, prefill, reading_to_decode
from headshare_jax.model.llama import Llama
from headshare_jax.sharing.shapes import cache_slots

# Bytes that the keys and values of windows that are written side by side may take.
_CACHE_BYTES = 2**30
# Slots of a cache at first: with more than windows have tokens yet, each token would read as many for nothing.
_SLOTS = 256
# Tokens between two calls of `progress`.
_STEP = 32


def own_text(
    model: Llama,
    count: int,
    seq_len: int,
    *,
    beginnings: Sequence[Sequence[int]] | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Windows that a model writes: what it holds to be likely, drawn token by token.

    A window begins with a beginning and goes on to its last token: where a text ends, the next one begins. As many
    windows are written side by side as 1 GiB of keys and values holds.

    Args:
      model: in memory as a whole.
      count: windows.
      seq_len: tokens in each.
      beginnings: token ids that windows begin with in turn, at least one each and all of a length; by default the token
        that begins a text, or else one that ends it, or else the one of id 0.
      sampling: at a temperature of 1 by default.
      seed: of the draws.
      progress: called with the tokens of every window that are written, and in all.

    Returns:
      int32 [count, seq_len]. The same arguments give the same tokens on the same device.

    Raises:
      HeadshareError: no window, one too short for its beginning, or one beyond the context that the model reads.

    Examples:
      >>> hs.own_text(model, 4, 64).shape
      (4, 64)
    """
    beginnings = beginnings or [[_first_token(model.config)]]
    length = len(beginnings[0])
    if count < 1 or not 0 < length < seq_len or any(len(beginning) != length for beginning in beginnings):
        raise HeadshareError(
            f"A model cannot write {count} windows of {seq_len} tokens that begin with {length}: windows need to be "
            "longer than their beginnings, and these of one length."
        )
    check_window(model.config, seq_len)
    starts_wt = np.asarray([beginnings[window % len(beginnings)] for window in range(count)], np.int32)
    together = _windows_together(model.config, count, seq_len)
    batches = [starts_wt[begin : begin + together] for begin in range(0, count, together)]
    written = []
    for place, starts_bt in enumerate(batches):
        # The last batch is filled up, so that all have one shape.
        filled_bt = np.concatenate([starts_bt, np.repeat(starts_bt[:1], together - len(starts_bt), axis=0)])
        key = jax.random.fold_in(jax.random.key(seed), place)

        def told(done: int, place: int = place) -> None:
            progress(place * seq_len + done, len(batches) * seq_len)

        written.append(_continued(model, filled_bt, seq_len, sampling or Sampling(1.0), key, told)[: len(starts_bt)])
    return np.concatenate(written)


def check_window(config: LlamaConfig, seq_len: int) -> None:
    """Raises HeadshareError unless a model can write windows of so many tokens."""
    if not 2 <= seq_len <= (most := context(config)):
        raise HeadshareError(
            f"A model with a context of {most} tokens writes windows of 2 to {most}, not {seq_len}.",
            option="seq_len",
        )


def _continued(
    model: Llama, starts_bt: np.ndarray, seq_len: int, sampling: Sampling, key: jax.Array, told: Callable[[int], None]
) -> np.ndarray:
    """Windows that go on from their first tokens, int32 [B, seq_len]."""
    batch, length = starts_bt.shape
    reading = reading_to_decode(model, batch)
    add = partial(
        decode, model, stop_tokens=jnp.zeros(0, jnp.int32), room=_STEP + 1, sampling=sampling, reading=reading
    )
    lengths_b = jnp.full(batch, length, jnp.int32)
    # A cache of sliding windows does not grow.
    grows = cache_slots(model.config, seq_len) == seq_len
    cache = model.empty_cache(batch, min(_SLOTS, seq_len) if grows and length <= _SLOTS else seq_len)
    token_b, cache = prefill(
        model, jnp.asarray(starts_bt), lengths_b, cache, jax.random.fold_in(key, length), sampling=sampling
    )
    windows_bt = np.concatenate([starts_bt, np.asarray(token_b)[:, None]], axis=1)
    while windows_bt.shape[1] < seq_len:
        told(windows_bt.shape[1])
        more = min(_STEP, seq_len - windows_bt.shape[1])
        if grows and (needed := windows_bt.shape[1] + more) > cache.slots:
            cache = cache.with_slots(min(max(2 * cache.slots, needed), seq_len))
        # The first token that `decode` gives is the one that it was given.
        out_bt, _, cache = add(
            jnp.asarray(windows_bt[:, -1]), cache, jax.random.fold_in(key, windows_bt.shape[1]), jnp.int32(more + 1)
        )
        windows_bt = np.concatenate([windows_bt, np.asarray(out_bt)[:, 1 : more + 1]], axis=1)
    told(seq_len)
    return windows_bt


def _first_token(config: LlamaConfig) -> int:
    """What windows begin with where nothing else is asked for."""
    return config.bos_token_id if config.bos_token_id is not None else (*config.eos_token_ids, 0)[0]


def context(config: LlamaConfig) -> int:
    """Positions up to which all keys turn by the same factors."""
    scaling = config.rope_scaling
    original = scaling.original_max_position_embeddings if scaling and scaling.kind == "longrope" else None
    return min(original or config.max_position_embeddings, config.max_position_embeddings)


def _windows_together(config: LlamaConfig, count: int, seq_len: int) -> int:
    """Windows that are written side by side: equal shares of them, as few as fit."""
    batches = -(-count // max(1, _CACHE_BYTES // _bytes_each(config, seq_len)))
    return -(-count // batches)


def cache_bytes(config: LlamaConfig, count: int, seq_len: int) -> int:
    """Bytes of the keys and values of the windows, of so many, that are written side by side."""
    return _windows_together(config, count, seq_len) * _bytes_each(config, seq_len)


def _bytes_each(config: LlamaConfig, seq_len: int) -> int:
    """Bytes of a window's keys and values in float32."""
    return 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * seq_len
