"""A run whose model, text, recipe, cache and output are all in a bucket is the run that a folder would have had."""

import os
import subprocess
import sys
from pathlib import Path

import buckets
import numpy as np
import pytest
from postshare_run import final_weights, losses, recipe

from headshare_jax.convert import storage
from headshare_jax.train import recipe as recipes

pytestmark = pytest.mark.slow


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "headshare_jax", "postshare", *map(str, arguments)]


@pytest.mark.parametrize("scheme", buckets.SCHEMES)
def test_a_run_in_a_bucket_is_killed_and_resumed(
    scheme: str, workplace: Path, finished: Path, servers: dict[str, buckets.Server]
) -> None:
    there = storage.path(f"{scheme}://{buckets.BUCKET}/postshare")
    for file in [*workplace.glob("model/*"), *workplace.glob("*.txt")]:
        storage.upload(file, there / file.relative_to(workplace).as_posix())
    of_run = recipes.to_yaml(recipe(workplace)).replace(str(workplace), str(there))
    (there / "recipe.yaml").write_text(of_run, encoding="utf-8")
    variables = {**os.environ, **servers[scheme].variables, "HEADSHARE_CACHE": f"{there}/cache"}
    arguments = ["--config", f"{there}/recipe.yaml", "-o", f"{there}/run"]
    with subprocess.Popen(command(*arguments), env=variables, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        # Behind the checkpoint of step 4.
        assert any(line.startswith("step 5") for line in run.stderr)
        run.kill()
    subprocess.run(command(*arguments, "--resume"), env=variables, check=True)
    assert losses(there / "run") == losses(finished)
    expected = final_weights(finished)
    for name, values in final_weights(there / "run").items():
        np.testing.assert_array_equal(values, expected[name])
    assert not [name for name in storage.files(there) if name.rpartition("/")[2].startswith(".")]
