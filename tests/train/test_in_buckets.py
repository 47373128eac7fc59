"""A run whose model, text, recipe, cache and output are all in a bucket is the run that a folder would have had."""

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import IO

import buckets
import compiled
import gcs_server
import numpy as np
import pytest
from postshare_run import final_weights, losses, recipe
from support_processes import ended, started

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


def read_until(words: IO[str] | None, step: str) -> None:
    """Reads what a run says until the line of a step; a run that ends before fails with its words."""
    said = []
    for line in words or ():
        said.append(line)
        if line.startswith(step):
            return
    pytest.fail(f"no line of {step}: {''.join(said)}")


def resume(run_it: list[str], variables: dict[str, str]) -> None:
    """Goes on with a run to its end."""
    done = subprocess.run([*run_it, "--resume"], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
        # Behind the checkpoint of step 4.
        read_until(run.stderr, "step 5")
        run.kill()
    resume(run_it, variables)
    assert_as_in_a_folder(there, finished)


@pytest.fixture(scope="module")
def finished_by_four(workplace: Path) -> Path:
    """The run of `finished` by four processes, never interrupted."""
    (workplace / "recipe.yaml").write_text(recipes.to_yaml(recipe(workplace)))
    assert_done(by_four("--config", workplace / "recipe.yaml", "-o", workplace / "four"))
    return workplace / "four"


def by_four(*arguments: object, **variables: str) -> list[subprocess.Popen[str]]:
    """Starts a run in four processes that have the devices of one."""
    return started(arguments, 4, **variables | {"XLA_FLAGS": compiled.flags(2)})


def assert_done(processes: list[subprocess.Popen[str]]) -> None:
    for code, said in ended(processes):
        assert code == 0, said


@pytest.mark.parametrize("scheme", buckets.SCHEMES)
def test_a_run_of_four_processes_in_a_bucket_is_killed_and_resumed(
    scheme: str, workplace: Path, finished_by_four: Path, servers: dict[str, buckets.Server]
) -> None:
    there, run_it, variables = begin(scheme, workplace, servers[scheme].variables)
    arguments = run_it[run_it.index("postshare") + 1 :]
    killed = by_four(*arguments, **variables)
    # Behind the checkpoint of step 4.
    read_until(killed[0].stdout, "step 5")
    for process in killed:
        process.kill()
    assert [code for code, _ in ended(killed)] == [-signal.SIGKILL] * 4
    assert_done(by_four(*arguments, "--resume", **variables))
    assert_as_in_a_folder(there, finished_by_four)


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
        # Behind the checkpoint of step 2.
        read_until(run.stderr, "step 5")
        server.broken = True
        assert run.stderr is not None
        words = [line for line in run.stderr if line.startswith("headshare: ")]
    assert (run.returncode, len(words)) == (75, 1), words
    told = re.search(
        rf"{there}/run/\S+ was not (reached|written: it was not reached) \(.+\); try again when the network and the "
        r"storage are back; the last checkpoint is of step (\d): resume the run \(--resume\)\.$",
        words[0],
    )
    assert told, words
    assert f"{there.name}/run/checkpoints/{told[2]}/checkpoint.json" in server.buckets[buckets.BUCKET]
    server.broken = False
    resume(run_it, variables)
    assert_as_in_a_folder(there, finished)
    server.stop()
