"""Text generation with a key/value cache, on the device from the first token to the last."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.model.cache import KVCache
from headshare_jax.model.llama import Llama
from headshare_jax.model.mesh import batch_sharding, put, rows_of
from headshare_jax.model.reading import (
    STACKED_MATRICES,
    OwnMatrices,
    Reading,
    choose,
    choose_for_prompts,
    unstacked,
)
from headshare_jax.output_head import drawn, most_likely
from headshare_jax.sharing import finite
from headshare_jax.sharing.source import slots_per_head
from headshare_jax.typed import check_fields, typed

# Prompts and answers are padded to multiples of this, so that nearby lengths share one compilation.
BUCKET = 64
MOST_NEW_TOKENS = 2**20
# How many times the model's context a prompt may be long.
MOST_CONTEXTS = 16
# What is drawn from logits that are not finite.
NOT_FINITE = -1


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens can be drawn; None for all.
      top_p: only the most likely tokens that together reach this probability can be drawn; 1 for all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.temperature >= 0:
            raise HeadshareError(f"temperature must be at least 0, not {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise HeadshareError(f"top_k must be at least 1, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise HeadshareError(f"top_p must be above 0 and at most 1, not {self.top_p}.")


@typed
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Continues a batch of prompts of any lengths.

    Compiles once for each batch size and bucket of lengths. Where the longest row leaves the original context of
    `longrope` scaling, whose other factors then turn all keys, everything so far is read again.

    Args:
      model: dense or shared; one that lies on a mesh (`Llama.of`) is run there, with as many rows as it divides.
      prompts: token ids, at least one in every prompt.
      max_new_tokens: most tokens to add to each prompt.
      sampling: greedy by default.
      stop_tokens: a row ends before the first of these; by default the model's end-of-sequence tokens.
      seed: of the draws.
      mesh: devices to run on: a copy of the model lies there meanwhile. By default where the model lies.

    Returns:
      The new tokens of every prompt, without the stop token.

    Raises:
      HeadshareError: no prompt, an empty prompt, or a token outside the vocabulary.
      NotFinite: logits that are NaN or infinite.

    Examples:
      >>> prompts = [tokenizer("Once upon a time").input_ids, tokenizer("The sea").input_ids]
      >>> answers = hs.generate(model, prompts, max_new_tokens=8)
      >>> text = tokenizer.batch_decode(answers)
    """
    if mesh is not None:
        model = Llama.of(model, mesh=mesh, compute_dtype=model.compute_dtype)
    sampling = sampling or Sampling()
    stops = checked(model.config, prompts, max_new_tokens, stop_tokens)
    before = min(max_new_tokens, before_long_factors(model.config, max(map(len, prompts))))
    answers = _continued(model, prompts, before, sampling, stops, seed)
    unfinished = [row for row, answer in enumerate(answers) if before == len(answer) < max_new_tokens]
    if unfinished:
        # Keys of all positions turn by other factors from here on: everything is read again.
        begun = [[*prompts[row], *answers[row]] for row in unfinished]
        rest = generate(
            model, begun, max_new_tokens=max_new_tokens - before, sampling=sampling, stop_tokens=stops, seed=seed + 1
        )
        for row, more in zip(unfinished, rest, strict=True):
            answers[row] += more
    return answers


def checked(
    config: LlamaConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_tokens: Sequence[int] | None
) -> tuple[int, ...]:
    """The stop tokens, by default the model's; raises HeadshareError for what cannot be continued."""
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows or any(row.ndim == 1 and row.size == 0 for row in rows):
        raise HeadshareError("Generation needs at least one token in every prompt.")
    for row in rows:
        if row.ndim != 1 or row.dtype.kind not in "iuO":
            raise HeadshareError("A prompt must be a list of token ids, which are whole numbers.")
        if row.dtype.kind == "O" or row.min() < 0 or row.max() >= config.vocab_size:
            raise HeadshareError(f"A prompt holds a token outside the vocabulary of {config.vocab_size}.")
    longest, context = max(map(len, rows)), config.max_position_embeddings
    if longest > MOST_CONTEXTS * context:
        raise HeadshareError(
            f"A prompt has {longest} tokens, more than {MOST_CONTEXTS} times the {context} that the model was made "
            "for; shorten it."
        )
    if not isinstance(max_new_tokens, (int, np.integer)) or not 1 <= max_new_tokens <= MOST_NEW_TOKENS:
        raise HeadshareError(
            f"max_new_tokens must be a whole number from 1 to {MOST_NEW_TOKENS}, not {max_new_tokens!r:.99}.",
            option="max_new_tokens",
        )
    stops = config.eos_token_ids if stop_tokens is None else stop_tokens
    # No other token is ever drawn.
    return tuple(token for token in stops if 0 <= token < config.vocab_size)


def _continued(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stops: tuple[int, ...],
    seed: int,
) -> list[list[int]]:
    count = len(prompts)
    # A mesh has a place for so many rows, all of which do something.
    prompts = [*prompts, *[prompts[0]] * (-count % rows_of(model.mesh))]
    first_key, key = jax.random.split(jax.random.key(seed))
    token_b, cache = read_prompts(model, prompts, max_new_tokens, first_key, sampling)
    check_drawn(token_b)
    if max_new_tokens == 1:
        return [[] if token in stops else [token] for token in token_b[:count].tolist()]
    out_bt, length_b, _ = decode(
        model,
        token_b,
        cache,
        key,
        jnp.int32(max_new_tokens),
        jnp.asarray(stops, jnp.int32),
        jnp.int32(0),
        room=bucket(max_new_tokens),
        sampling=sampling,
        reading=reading_to_decode(model, len(prompts)),
    )
    found_bt, found_b = np.asarray(out_bt), np.asarray(length_b)
    check_drawn(ends(found_bt, found_b))
    return [row[:length].tolist() for row, length in zip(found_bt[:count], found_b[:count], strict=True)]


def ends(out_bt: np.ndarray, length_b: np.ndarray) -> np.ndarray:
    """What ended every row of `decode`, int32 [B]: a stop token, `NOT_FINITE`, or nothing of note."""
    return out_bt[np.arange(len(out_bt)), np.minimum(length_b, out_bt.shape[1] - 1)]


def check_drawn(token_b: jax.typing.ArrayLike) -> None:
    """Raises NotFinite if some token was drawn from logits that are not finite."""
    if (np.asarray(token_b) == NOT_FINITE).any():
        raise finite.NotFinite(f"The model's logits are NaN or infinite, so that no token can be drawn: {finite.CAUSE}")


def read_prompts(
    model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, key: jax.Array, sampling: Sampling
) -> tuple[jax.Array, KVCache]:
    """The first new token of every prompt, and a cache that holds the prompts and has room for the others."""
    lengths = [len(prompt) for prompt in prompts]
    tokens_bt = np.zeros((len(prompts), bucket(max(lengths))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_bt[row, : len(prompt)] = prompt
    cache = model.empty_cache(len(prompts), tokens_bt.shape[1] + bucket(max_new_tokens))
    reading = choose_for_prompts(model.device, len(prompts), tokens_bt.size)
    rows = (tokens_bt, np.asarray(lengths, np.int32))
    if model.mesh is None or len(prompts) % rows_of(model.mesh):
        tokens, prompt_b = map(jnp.asarray, rows)
    else:
        tokens, prompt_b = (put(row, batch_sharding(model.mesh)) for row in rows)
    return prefill(model, tokens, prompt_b, cache, key, sampling=sampling, reading=reading)


def before_long_factors(config: LlamaConfig, length: int) -> int:
    """Tokens that are added to prompts of at most some length before `longrope` goes over to its long factors."""
    scaling = config.rope_scaling
    original = scaling.original_max_position_embeddings if scaling and scaling.kind == "longrope" else None
    return sys.maxsize if original is None or original < length else original - length + 1


def reading_to_decode(model: Llama, batch: int) -> Reading:
    """How weights are best read where tokens are added one at a time to a batch of rows."""
    reading, device = choose(model.config, model.device, batch, slots_per_head(model.sharing)), model.device
    if device is None or device.platform != "cpu":
        return reading
    # XLA's CPU backend copies what it slices from a stack.
    return OwnMatrices(reading, unstacked({name: model.array(name) for name in STACKED_MATRICES}))


def bucket(length: int) -> int:
    """The length that something of a length is padded to."""
    return -(-length // BUCKET) * BUCKET


@partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def prefill(
    model: Llama,
    tokens_bt: jax.Array,
    prompt_b: jax.Array,
    cache: KVCache,
    key: jax.Array,
    *,
    sampling: Sampling,
    reading: Reading | None = None,
) -> tuple[jax.Array, KVCache]:
    """Reads the prompts, as `Llama.prefill` does, and draws the first new token of every row."""
    features_bd, cache = model.prefill(tokens_bt, prompt_b, cache, reading)
    return draw(model.logits(features_bd), key, sampling), cache


@partial(jax.jit, static_argnames=("room", "sampling"), donate_argnames="cache")
def decode(
    model: Llama,
    token_b: jax.Array,
    cache: KVCache,
    key: jax.Array,
    limit: jax.Array,
    stop_tokens: jax.Array,
    before: jax.Array | None = None,
    *,
    room: int,
    sampling: Sampling,
    reading: Reading | None = None,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Adds tokens until every row has met a stop token or `NOT_FINITE`, or `limit` is reached.

    Args:
      model: dense or shared.
      token_b: int32 [B], the first new tokens, or the last ones where others come before.
      cache: holds everything before them.
      key: of the draws.
      limit: int32 scalar, most new tokens.
      stop_tokens: int32 [any number].
      before: int32 scalar, new tokens that come before `token_b`; by default none. They count in no length.
      room: at least `limit`.
      sampling: how tokens are drawn.
      reading: as for `Llama.extend`.

    Returns:
      Tokens, int32 [B, room]; how many of each row come before its end, int32 [B]; and the cache, so that the
      donated one can be written in place.
    """

    def unfinished(rows: _Rows) -> jax.Array:
        return (rows.filled < limit) & ~jnp.all(rows.done_b)

    def step(rows: _Rows) -> _Rows:
        features_btd, cache = model.extend(rows.token_b[:, None], rows.cache, reading)
        count = rows.filled - 1 if before is None else before + rows.filled - 1
        draw_key = jax.random.fold_in(key, count)
        return placed(draw(model.logits(features_btd[:, -1]), draw_key, sampling), rows, cache)

    def placed(token_b: jax.Array, rows: _Rows, cache: KVCache) -> _Rows:
        ended_b = jnp.any(token_b[:, None] == stop_tokens[None, :], axis=1) | (token_b == NOT_FINITE)
        done_b = rows.done_b | ended_b
        filled = rows.filled + 1
        out_bt = jax.lax.dynamic_update_slice(rows.out_bt, token_b[:, None], (0, rows.filled))
        return _Rows(filled, token_b, out_bt, done_b, rows.length_b + (~done_b).astype(jnp.int32), cache)

    batch = token_b.shape[0]
    out_bt, done_b = jnp.zeros((batch, room), jnp.int32), jnp.zeros(batch, bool)
    nothing = _Rows(jnp.int32(0), token_b, out_bt, done_b, jnp.zeros(batch, jnp.int32), cache)
    rows = jax.lax.while_loop(unfinished, step, placed(token_b, nothing, cache))
    return rows.out_bt, rows.length_b, rows.cache


class _Rows(NamedTuple):
    """A batch being continued: tokens placed, the last of them, all of them, and which rows are done."""

    filled: jax.Array
    token_b: jax.Array
    out_bt: jax.Array
    done_b: jax.Array
    length_b: jax.Array
    cache: KVCache


def draw(logits_bv: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of every row, int32 [B]; `NOT_FINITE` where logits are NaN or infinite."""
    return jnp.where(jnp.isfinite(logits_bv).all(axis=-1), _drawn(logits_bv, key, sampling), NOT_FINITE)


def _drawn(logits_bv: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    if sampling.temperature == 0:
        return most_likely(logits_bv)
    logits_bv = logits_bv / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_bv.shape[-1]:
        least_b = jax.lax.top_k(logits_bv, sampling.top_k)[0][:, -1:]
        logits_bv = jnp.where(logits_bv < least_b, -jnp.inf, logits_bv)
    if sampling.top_p < 1:
        sorted_bv = jnp.sort(logits_bv, axis=-1, descending=True)
        probability_bv = jax.nn.softmax(sorted_bv, axis=-1)
        before_bv = jnp.cumsum(probability_bv, axis=-1) - probability_bv
        least_b = jnp.min(jnp.where(before_bv < sampling.top_p, sorted_bv, jnp.inf), axis=-1, keepdims=True)
        logits_bv = jnp.where(logits_bv < least_b, -jnp.inf, logits_bv)
    return drawn(key, logits_bv)
