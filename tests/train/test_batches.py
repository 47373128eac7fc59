"""The order of batches: every block once an epoch, a function of the seed and the step."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headshare_jax.train.data import Batches, Mixture


class Numbered:
    """Blocks of three tokens that hold their own number, after those of other texts, and its negative as segments."""

    seq_len, digest = 3, "digest"

    def __init__(self, count: int, before: int = 0):
        self.count, self.before = count, before
        self.seen: list[int] = []

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert not numbers.size or 0 <= numbers.min() <= numbers.max() < self.count
        self.seen += numbers.ravel().tolist()
        tokens = np.repeat(numbers.astype(np.int32)[..., None] + self.before, self.seq_len, axis=-1)
        return tokens, -tokens


def numbered_blocks(count: int) -> Mixture:
    return mixed([count], [1.0])


def mixed(counts: list[int], weights: list[float]) -> Mixture:
    parts: Any = [Numbered(count, sum(counts[:place])) for place, count in enumerate(counts)]
    return Mixture(tuple(parts), tuple(weights))


def order(count: int, *, seed: int, batch_size: int = 16, accumulate: int = 1, epochs: int = 1) -> np.ndarray:
    """Blocks in the order in which they are seen, [epochs, count]."""
    batches = Batches(numbered_blocks(count), batch_size=batch_size, accumulate=accumulate, seed=seed)
    steps = -(-count * epochs // batch_size)
    seen = np.concatenate([batches.at(step)[0][..., 0].ravel() for step in range(steps)])
    return seen[: count * epochs].reshape(epochs, count)


# Grain needs about 10 ms to place one of very few blocks.
@settings(max_examples=10)
@given(count=st.integers(1, 40), per_part=st.integers(1, 6), accumulate=st.integers(1, 4), seed=st.integers(0, 2**70))
def test_every_block_comes_once_in_an_epoch(count: int, per_part: int, accumulate: int, seed: int) -> None:
    seen = order(count, seed=seed, batch_size=per_part * accumulate, accumulate=accumulate, epochs=2)
    np.testing.assert_array_equal(np.sort(seen, axis=1), np.tile(np.arange(count), (2, 1)))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = np.concatenate([order(64, seed=seed, epochs=4) for seed in range(4)])
    assert len(np.unique(orders, axis=0)) == len(orders) == 16
    np.testing.assert_array_equal(orders[:4], order(64, seed=0, batch_size=24, accumulate=3, epochs=4))


def test_a_run_that_was_begun_can_be_resumed_with_another_release() -> None:
    """The order itself is what a checkpoint relies on: it keeps the step and nothing else."""
    known = [[5, 3, 6, 7, 4, 2, 1, 0], [6, 5, 4, 1, 0, 7, 3, 2]]
    np.testing.assert_array_equal(order(8, seed=0, epochs=2), known)


def test_parts_hold_the_blocks_of_one_batch() -> None:
    blocks = numbered_blocks(10)
    whole = Batches(blocks, batch_size=6, accumulate=1, seed=1).at(3)
    tokens, segments = Batches(blocks, batch_size=6, accumulate=2, seed=1).at(3)
    assert tokens.shape == segments.shape == (2, 3, 3)
    assert tokens.dtype == segments.dtype == np.int32
    np.testing.assert_array_equal(tokens.reshape(1, 6, 3), whole[0])
    np.testing.assert_array_equal(segments, -tokens)


@pytest.mark.parametrize("rows", [slice(1, 3), slice(None), np.array([3, 0]), np.array([], np.int64)])
def test_rows_are_a_part_of_the_batch_and_no_other_is_read(rows: slice | np.ndarray) -> None:
    blocks: Any = numbered_blocks(50)
    whole = Batches(blocks, batch_size=8, accumulate=2, seed=1).at(7)
    blocks.parts[0].seen.clear()
    part = Batches(blocks, batch_size=8, accumulate=2, seed=1).at(7, rows)
    for some, everything in zip(part, whole, strict=True):
        np.testing.assert_array_equal(some, everything[:, rows])
    assert sorted(blocks.parts[0].seen) == sorted(whole[0][:, rows, 0].ravel())


def mixture_order(counts: list[int], weights: list[float], steps: int, seed: int = 0) -> np.ndarray:
    """Blocks in the order in which they are seen, 5 a step."""
    batches = Batches(mixed(counts, weights), batch_size=5, accumulate=1, seed=seed)
    return np.concatenate([batches.at(step)[0][..., 0].ravel() for step in range(steps)])


def test_texts_take_turns_by_their_weights() -> None:
    seen = mixture_order([30, 7, 50], [2, 1, 0.5], steps=70)
    text = np.searchsorted([30, 37], seen, "right")
    for end in (35, 140, 350):
        np.testing.assert_allclose(np.bincount(text[:end]), end * np.array([2, 1, 0.5]) / 3.5, atol=1.01)
    # A text comes whole before any block of it comes again, in another order.
    for place, first, count in ((0, 0, 30), (1, 30, 7)):
        epochs = seen[text == place][: 3 * count].reshape(3, count)
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(first, first + count), (3, 1)))
        assert len(np.unique(epochs, axis=0)) == 3


def test_a_mixture_depends_on_the_seed_and_the_step_alone() -> None:
    orders = [mixture_order([30, 40], [2, 1], steps=10, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    # As above: this order is what a checkpoint of a mixture relies on.
    assert orders[0][:10].tolist() == [18, 8, 48, 16, 7, 58, 20, 13, 45, 24]


def test_the_first_blocks_of_a_mixture_are_the_first_of_its_texts() -> None:
    assert mixed([10, 20], [2, 1]).first(6)[:, 0].tolist() == [0, 1, 10, 2, 3, 11]


def test_a_mixture_is_known_by_its_texts_and_weights() -> None:
    assert mixed([3], [1.0]).digest == "digest"
    assert len({mixed([3, 4], weights).digest for weights in ([1, 1], [1, 2], [2, 1])}) == 3


def test_a_stream_is_the_steps_in_order() -> None:
    batches = Batches(numbered_blocks(11), batch_size=4, accumulate=2, seed=3)
    rows = np.array([1])
    streamed = list(batches.stream(5, 12, rows))
    assert len(streamed) == 7
    for step, parts in enumerate(streamed, 5):
        np.testing.assert_array_equal(parts, batches.at(step, rows))
    assert list(batches.stream(5, 5)) == []


def test_a_stream_reads_a_little_ahead() -> None:
    asked = []

    class Watched(Batches):
        def at(self, step: int, rows: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, np.ndarray]:
            asked.append(step)
            return super().at(step, rows)

    stream = Watched(numbered_blocks(11), batch_size=4, accumulate=2, seed=3).stream(0, 10**12)
    for _ in range(3):
        next(stream)
    assert asked == list(range(len(asked)))
    assert len(asked) <= 8


def test_an_error_while_reading_ahead_is_raised() -> None:
    batches = Batches(numbered_blocks(11), batch_size=4, accumulate=2, seed=3)
    with pytest.raises(IndexError):
        list(batches.stream(0, 3, np.array([2])))
