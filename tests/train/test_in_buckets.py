"""A run whose model, text, recipe, cache and output are all in a bucket is the run that a folder would have had."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import buckets
import gcs_server
import numpy as np
import pytest
from postshare_run import final_weights, losses, recipe

from headshare_jax.convert import storage
from headshare_jax.train import recipe as recipes

pytestmark = pytest.mark.slow


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "headshare_jax", "postshare", *map(str, arguments)]


def begin(scheme: str, workplace: Path, variables: dict[str, str]) -> tuple[Path, list[str], dict[str, str]]:
    """A bucket's folder with all that a run needs, the arguments of that run, and its environment."""
    there = storage.path(f"{scheme}://{buckets.BUCKET}/postshare-{uuid.uuid4().hex[:8]}")
    for file in [*workplace.glob("model/*"), *workplace.glob("*.txt")]:
        storage.upload(file, there / file.relative_to(workplace).as_posix())
    of_run = recipes.to_yaml(recipe(workplace)).replace(str(workplace), str(there))
    (there / "recipe.yaml").write_text(of_run, encoding="utf-8")
    arguments = command("--config", f"{there}/recipe.yaml", "-o", f"{there}/run")
    return there, arguments, {**os.environ, **variables, "HEADSHARE_CACHE": f"{there}/cache"}


def assert_as_in_a_folder(there: Path, finished: Path) -> None:
    """Asserts that a run in a bucket came to what the one in a folder did, and left nothing beside it."""
    assert losses(there / "run") == losses(finished)
    expected = final_weights(finished)
    for name, values in final_weights(there / "run").items():
        np.testing.assert_array_equal(values, expected[name])
    assert not [name for name in storage.files(there) if name.rpartition("/")[2].startswith(".")]


@pytest.mark.parametrize("scheme", buckets.SCHEMES)
def test_a_run_in_a_bucket_is_killed_and_resumed(
    scheme: str, workplace: Path, finished: Path, servers: dict[str, buckets.Server]
) -> None:
    there, run_it, variables = begin(scheme, workplace, servers[scheme].variables)
    with subprocess.Popen(run_it, env=variables, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        # Behind the checkpoint of step 4.
        assert any(line.startswith("step 5") for line in run.stderr)
        run.kill()
    subprocess.run([*run_it, "--resume"], env=variables, check=True)
    assert_as_in_a_folder(there, finished)


def test_a_bucket_that_breaks_off_ends_a_run_that_goes_on_later(
    workplace: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = gcs_server.Server()
    server.buckets[buckets.BUCKET] = {}
    server.start()
    found = buckets.variables("gs", server.url)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    there, run_it, variables = begin("gs", workplace, found)
    with subprocess.Popen(run_it, env=variables, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        assert any(line.startswith("step 3") for line in run.stderr)
        server.broken = True
        said = [line for line in run.stderr if line.startswith("headshare: ")]
    assert run.returncode == 75
    assert len(said) == 1
    assert "not reached" in said[0]
    server.broken = False
    subprocess.run([*run_it, "--resume"], env=variables, check=True)
    assert_as_in_a_folder(there, finished)
    server.stop()
