"""The folder of a run: what lies in it, and whether a run may begin or go on there."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jax

from headshare_jax.convert import bucket_errors, gguf_writer, run_checkpoint, storage
from headshare_jax.convert.atomic import check_output, check_place, new_directory
from headshare_jax.convert.locks import held
from headshare_jax.errors import HeadshareError, TryAgain
from headshare_jax.processes.agreement import from_first, wait_for_all
from headshare_jax.sharing.map import SharingMap
from headshare_jax.train import recipe as recipes

CONFIG, CHECKPOINTS = run_checkpoint.CONFIG, run_checkpoint.CHECKPOINTS
MAP, REFIT, FINAL, PROFILE = "map.json", "refit.json", "final", "profile"
# So long may a network's file system take to show what another machine has written.
_SECONDS_TO_APPEAR = 15.0
# What a resumed run may have changed: where it runs, by how many threads, when it gives up, how its model is written.
_FREE = ("mesh.", "data.workers:", "max_bad_steps:", "max_skipped:", "final.")


def check(output: Path, recipe: recipes.Recipe, resume: bool) -> None:
    """Raises HeadshareError if a run cannot begin in a folder, or a run with this recipe cannot go on there."""
    path = output / CONFIG
    if not resume:
        if storage.is_file(path):
            raise HeadshareError(f"{output} holds a run already; resume it, or choose another folder.", option="resume")
        check_place(output, folder=True)
        if output.exists():
            raise HeadshareError(f"{output} exists already; choose another folder.")
        return
    if not storage.is_file(path):
        raise HeadshareError(f"{output} holds no run to resume (no {CONFIG}); leave resume out to begin one there.")
    changed = [line for line in recipes.difference(recipes.load(path), recipe) if not line.startswith(_FREE)]
    if changed:
        raise HeadshareError(
            f"The recipe differs from that of the run in {output}: {'; '.join(changed)}. Undo the change (the run's "
            f"recipe is {path}), or begin a new run in another folder."
        )
    check_output(final(output, recipe), folder=recipe.final.to != "gguf", overwrite=True)


def final(output: Path, recipe: recipes.Recipe) -> Path:
    """Where the model is written that a run ends with."""
    return output / (f"{FINAL}{gguf_writer.ENDING}" if recipe.final.to == "gguf" else FINAL)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps other runs out of a run's folder; the first process has it for all of a distributed run.

    Raises:
      TryAgain: another run goes on there.
    """
    with held(output) if jax.process_index() == 0 else nullcontext():
        yield


def begin(output: Path, recipe: recipes.Recipe, sharing: SharingMap) -> None:
    """Makes the run's folder with recipe and map, which appear together: without them, nothing could be resumed."""
    if jax.process_index() == 0:
        with new_directory(output) as folder:
            (folder / CONFIG).write_text(recipes.to_yaml(recipe))
            (folder / MAP).write_text(sharing.to_json())


def check_seen(output: Path) -> None:
    """Raises HeadshareError in a process that does not see the folder as the first one does."""
    if jax.process_count() == 1:
        return
    first = jax.process_index() == 0
    mark = output / from_first("mark", f".seen-{secrets.token_hex(6)}" if first else "")
    if first:
        mark.touch()
    wait_for_all("marked")
    try:
        deadline = time.monotonic() + _SECONDS_TO_APPEAR
        # Listed again, as a network's file system may remember that a file was not there.
        while not (mark.name in {path.name for path in output.glob(".seen-*")} or time.monotonic() > deadline):
            time.sleep(0.5)
        if time.monotonic() > deadline:
            raise HeadshareError(
                f"It does not see the folder {output} of the first process; name one that all processes see, such as a "
                "shared disk or a bucket."
            )
    finally:
        wait_for_all("looked for")
        if first:
            mark.unlink(missing_ok=True)


def undo(output: Path) -> None:
    """Takes a folder away again that `begin` has made."""
    if jax.process_index() == 0:
        for name in (CONFIG, MAP):
            (output / name).unlink(missing_ok=True)
        if not storage.in_bucket(output):
            output.rmdir()


@contextmanager
def resumable(newest: Callable[[], int | None]) -> Iterator[None]:
    """Adds how to go on to what ends a run that can be gone on with, as a bucket that is not reached; see `remedy`."""
    try:
        yield
    except Exception as error:
        refused = error if isinstance(error, HeadshareError) else bucket_errors.refusal_unnamed(error)
        if isinstance(refused, TryAgain):
            raise TryAgain(f"{str(refused).removesuffix('.')}; {remedy(newest())}.") from error
        raise


def remedy(newest: int | None) -> str:
    """What to do when a run has broken off, as it ends a sentence.

    Args:
      newest: step of the last checkpoint, as this process knows it: the storage may be what broke off.
    """
    last = "" if newest is None else f"the last checkpoint is of step {newest}: "
    again = "start all processes again, and " if jax.process_count() > 1 else ""
    return f"{last}{again}resume the run (--resume)"
