"""Generation that gives its tokens a few at a time, for who reads along, and conversations that keep what was read."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.model.cache import KVCache
from headshare_jax.model.generate import (
    Sampling,
    before_long_factors,
    bucket,
    check_drawn,
    checked,
    decode,
    draw,
    ends,
    read_prompts,
    reading_to_decode,
)
from headshare_jax.model.llama import Llama
from headshare_jax.sharing.shapes import cache_slots

# Twice as many tokens are decoded at a time as long as this takes less than so many seconds, up to so many tokens.
PIECE_SECONDS, PIECE_TOKENS = 0.1, 16
# A conversation reads so many tokens at a time: the larger number as long as more than the smaller are left.
READ_TOKENS = (256, 64)
# Slots of a conversation's first cache; a longer one has twice as many, and so on.
LEAST_SLOTS = 512


def stream(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens of `generate` for one prompt, each as soon as it and a few more are decoded.

    It runs the programs that `generate` compiles.

    Args:
      model: dense or shared.
      prompt: token ids, at least one.
      max_new_tokens, sampling, stop_tokens, seed: as for `generate`.

    Returns:
      An iterator of the new tokens; nothing is computed before the first is asked for.

    Raises:
      HeadshareError: as `generate`, before the iterator is made.
    """
    sampling = sampling or Sampling()
    stops = checked(model.config, [prompt], max_new_tokens, stop_tokens)
    return _streamed(model, prompt, max_new_tokens, sampling, stops, seed)


class Conversation:
    """A model that answers turn after turn, and keeps the keys and values of what it has read and said.

    What a prompt has in common with the last one and its answer, from the first token on, is not read again. Where keys
    do not stay as they are, it is: where all layers have a sliding window that the text outgrows, and where `longrope`
    or `dynamic` scaling may turn keys by other angles than before.

    Attributes:
      model: dense or shared.
    """

    def __init__(self, model: Llama):
        self.model = model
        self._tokens: list[int] = []
        self._cache: KVCache | None = None

    def answer(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] | None = None,
        seed: int = 0,
    ) -> Iterator[int]:
        """The tokens that follow a prompt, which is all that was said before and the new turn.

        Arguments, result and errors are those of `stream`. An answer may be left off at any token.
        """
        sampling = sampling or Sampling()
        config, model = self.model.config, self.model
        stops = checked(config, [prompt], max_new_tokens, stop_tokens)
        most = len(prompt) + max(max_new_tokens, *READ_TOKENS)
        slots = LEAST_SLOTS
        while slots < most:
            slots *= 2
        if most > _turned_once(config) or cache_slots(config, slots) < slots:
            self._cache = None
            return _streamed(model, prompt, max_new_tokens, sampling, stops, seed)
        return self._answered([*map(int, prompt)], slots, max_new_tokens, sampling, stops, seed)

    def _answered(
        self, said: list[int], slots: int, max_new_tokens: int, sampling: Sampling, stops: tuple[int, ...], seed: int
    ) -> Iterator[int]:
        first_key, key = jax.random.split(jax.random.key(seed))
        cache, begin = self._begun(said, slots)
        while begin < len(said):
            size = READ_TOKENS[len(said) - begin <= READ_TOKENS[1]]
            piece = said[begin : begin + size]
            tokens_1t = np.zeros((1, size), np.int32)
            tokens_1t[0, : len(piece)] = piece
            token_b, cache = read_on(
                self.model, jnp.asarray(tokens_1t), jnp.int32(len(piece)), cache, first_key, sampling=sampling
            )
            begin += len(piece)
        steps = _decoded(self.model, token_b, cache, key, max_new_tokens, stops, sampling)
        while (step := next(steps, None)) is not None:
            tokens, cache = step
            said += tokens
            self._keep(said, cache)
            yield from tokens
            self._cache = None
        self._keep(said, cache)

    def _begun(self, prompt: list[int], slots: int) -> tuple[KVCache, int]:
        """A cache with room for so many tokens, and how many of a prompt's it holds; at least one is to be read.

        The cache is given away, for what runs next takes its memory: whoever is stopped there has none.
        """
        cache, self._cache = self._cache, None
        if cache is None:
            return self.model.empty_cache(1, slots), 0
        pairs = zip(self._tokens, prompt[:-1], strict=False)
        held = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return replace(cache.with_slots(slots), length=jnp.int32(held)), held

    def _keep(self, said: list[int], cache: KVCache) -> None:
        self._cache, self._tokens = cache, said[: int(cache.length)]


def _turned_once(config: LlamaConfig) -> int:
    """Tokens of a text up to which no key turns by other angles when the text grows."""
    kind = None if config.rope_scaling is None else config.rope_scaling.kind
    return config.max_position_embeddings if kind == "dynamic" else before_long_factors(config, 1)


@partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def read_on(
    model: Llama, tokens_1t: jax.Array, count: jax.Array, cache: KVCache, key: jax.Array, *, sampling: Sampling
) -> tuple[jax.Array, KVCache]:
    """Reads the next `count` tokens of a prompt, with padding behind them, and draws the token that follows them.

    The cache needs room for the padding, too, which the next tokens take the place of.
    """
    features_1td, grown = model.extend(tokens_1t, cache)
    last_1d = jax.lax.dynamic_index_in_dim(features_1td, count - 1, axis=1, keepdims=False)
    return draw(model.logits(last_1d), key, sampling), replace(grown, length=cache.length + count)


def _streamed(
    model: Llama, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, stops: tuple[int, ...], seed: int
) -> Iterator[int]:
    before = min(max_new_tokens, before_long_factors(model.config, len(prompt)))
    first_key, key = jax.random.split(jax.random.key(seed))
    token_b, cache = read_prompts(model, [prompt], before, first_key, sampling)
    answer: list[int] = []
    for tokens, _ in _decoded(model, token_b, cache, key, before, stops, sampling):
        answer += tokens
        yield from tokens
    if before == len(answer) < max_new_tokens:
        yield from _streamed(model, [*prompt, *answer], max_new_tokens - before, sampling, stops, seed + 1)


def _decoded(
    model: Llama,
    token_b: jax.Array,
    cache: KVCache,
    key: jax.Array,
    max_new_tokens: int,
    stops: tuple[int, ...],
    sampling: Sampling,
) -> Iterator[tuple[list[int], KVCache]]:
    """The tokens that follow a prompt, a few at a time, each time with the cache, which the next step takes back.

    Args:
      model: dense or shared.
      token_b: int32 [1], the first of them.
      cache: holds the prompt.
      key: of the draws.
      max_new_tokens: most tokens, the first among them.
      stops: they end before the first of these.
      sampling: how tokens are drawn.
    """
    check_drawn(token_b)
    token, count, most = int(token_b[0]), 1, 1
    if token in stops:
        return
    yield [token], cache
    reading, stops_s = reading_to_decode(model, 1), jnp.asarray(stops, jnp.int32)
    while count < max_new_tokens:
        began, wanted = time.perf_counter(), min(most, max_new_tokens - count)
        out_bt, length_b, cache = decode(
            model,
            jnp.asarray([token], jnp.int32),
            cache,
            key,
            jnp.int32(wanted + 1),
            stops_s,
            jnp.int32(count - 1),
            room=bucket(max_new_tokens),
            sampling=sampling,
            reading=reading,
        )
        check_drawn(ends(np.asarray(out_bt), np.asarray(length_b)))
        tokens = np.asarray(out_bt)[0, 1 : int(length_b[0])].tolist()
        yield tokens, cache
        if len(tokens) < wanted:
            return
        token, count = tokens[-1], count + wanted
        if time.perf_counter() - began < PIECE_SECONDS:
            most = min(2 * most, PIECE_TOKENS)
