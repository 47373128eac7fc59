"""What is refused for want of memory or disk."""

from pathlib import Path

import pytest

from headshare_jax import resources
from headshare_jax.errors import HeadshareError


def test_what_fits_passes_and_what_does_not_is_told_with_both_sizes(tmp_path: Path) -> None:
    resources.check_disk(tmp_path, 1, "The model")
    resources.check_memory(1, "The model", "choose a smaller one")
    with pytest.raises(
        HeadshareError, match=r"The model needs about 1,000,000,000.0 GB on the disk of .* left; make room"
    ):
        resources.check_disk(tmp_path, 10**18, "The model")
    with pytest.raises(
        HeadshareError, match=r"The model needs about 1,000,000,000.0 GB of memory, .* choose a smaller one"
    ):
        resources.check_memory(10**18, "The model", "choose a smaller one")


def test_memory_that_was_used_counts(tmp_path: Path) -> None:
    taken = bytearray(64 * 2**20)
    assert resources.peak_memory() > len(taken)
    assert resources.gigabytes(64_000_000) == "64.0 MB"
