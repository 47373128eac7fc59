"""Settings of every test: eight devices, strict shapes and types; and the fixtures that several files share."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile far more than they compute.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # pytest-xdist's workers inherit the variable and use the same folder; who made it removes it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="headshare-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("headshare", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("headshare")

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


def pytest_sessionstart() -> None:
    assert jax.device_count() == 8


@pytest.fixture(scope="session")
def tiny_mha() -> Path:
    """Published results on a small LLaMA checkpoint, where this machine has them."""
    return _reference("tiny-mha")


@pytest.fixture(scope="session")
def llama_2_7b() -> Path:
    """Published match results of Llama-2-7B, where this machine has them."""
    return _reference("llama-2-7b")


def _reference(name: str) -> Path:
    path = REFERENCE / name
    if not path.is_dir():
        pytest.skip(f"the reference data {name} is not on this machine")
    return path
