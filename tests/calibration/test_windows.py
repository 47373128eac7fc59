"""Windows of several texts: each text's part of any number of the first ones is what its weight says."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headshare_jax.calibration.windows import turns


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), count=st.integers(0, 200))
def test_every_text_has_its_part_all_along(weights: list[float], count: int) -> None:
    order = turns(weights, count)
    taken = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, count + 1)[:, None] * np.divide(weights, sum(weights))
    assert np.all(np.abs(taken - due) < 1 + 1e-9)


def test_texts_of_one_weight_alternate() -> None:
    assert turns([1, 1], 6).tolist() == [0, 1, 0, 1, 0, 1]
    assert np.bincount(turns([2, 1], 9)).tolist() == [6, 3]
