"""The order of batches: every block once an epoch, a function of the seed and the step."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headshare_jax.train.data import Batches, Blocks


def numbered_blocks(count: int, seq_len: int = 3) -> Blocks:
    """Blocks that hold their own number in all tokens, and its negative in all segments."""
    tokens = np.repeat(np.arange(count, dtype=np.int32)[:, None], seq_len, axis=1)
    return Blocks(tokens, -tokens, "digest")


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
    class Watched(np.ndarray):
        read: list[int]

        def __getitem__(self, place: Any) -> Any:
            self.read += place.ravel().tolist()
            return np.asarray(self)[place]

    blocks = numbered_blocks(50)
    whole = Batches(blocks, batch_size=8, accumulate=2, seed=1).at(7)
    watched = blocks.tokens.view(Watched)
    watched.read = []
    part = Batches(Blocks(watched, blocks.segments, "digest"), batch_size=8, accumulate=2, seed=1).at(7, rows)
    for some, everything in zip(part, whole, strict=True):
        np.testing.assert_array_equal(some, everything[:, rows])
    assert sorted(watched.read) == sorted(whole[0][:, rows, 0].ravel())


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
