"""Settings of every test: eight devices, strict shapes and types, and compiled programs kept from run to run."""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

from buckets import bucket, servers  # noqa: F401 (fixtures)
from compiled import CACHE, DAYS_KEPT, QUICK_FUSIONS, flags, folder

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = flags(8)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder())
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads of PyTorch and BLAS wait for one another by spinning; what tests give them is too small to divide.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("headshare", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("headshare")

# Published results, where this machine has them; what they show is shown on made models, too.
collect_ignore = [] if (Path(__file__).parents[2] / "shared" / "reference").is_dir() else ["test_published.py"]


def pytest_sessionstart(session: pytest.Session) -> None:
    assert jax.device_count() == 8
    # It has read the flags; libtpu, which reads them later, ends a process for one that it does not know.
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(QUICK_FUSIONS)
    if hasattr(session.config, "workerinput"):
        return
    for program in CACHE.glob("*/*"):
        if time.time() - program.stat().st_mtime > DAYS_KEPT * 24 * 3600:
            program.unlink(missing_ok=True)


def pytest_collection_finish() -> None:
    """What was imported is no garbage: it is not searched over and over."""
    gc.collect()
    gc.freeze()


# Every compiled program is mapped into memory in pieces, of which Linux allows a process 65,530; one more ends it.
MOST_MAPPED = 25_000


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs() -> Iterator[None]:
    """Forgets compiled programs, which are read again from disk, before a process holds too many."""
    yield
    mapped = Path("/proc/self/maps")
    if mapped.exists() and mapped.read_bytes().count(b"\n") > MOST_MAPPED:
        jax.clear_caches()
