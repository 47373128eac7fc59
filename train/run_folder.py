"""The folder of a run: what lies in it, and whether a run may begin or go on there."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jax

from headshare_jax.convert.atomic import check_output, check_place, new_directory
from headshare_jax.convert.locks import held
from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.map import SharingMap
from headshare_jax.train import recipe as recipes

CONFIG, MAP, REFIT, FINAL, CHECKPOINTS = "config.yaml", "map.json", "refit.json", "final", "checkpoints"
# What a resumed run may have changed: where it runs, by how many threads, and when it gives up.
_FREE = ("mesh.", "data.workers:", "max_bad_steps:", "max_skipped:")


def check(output: Path, recipe: recipes.Recipe, resume: bool) -> None:
    """Raises HeadshareError if a run cannot begin in a folder, or a run with this recipe cannot go on there."""
    path = output / CONFIG
    if not resume:
        if path.is_file():
            raise HeadshareError(f"{output} holds a run already; resume it, or choose another folder.", option="resume")
        check_place(output, folder=True)
        if output.exists():
            raise HeadshareError(f"{output} exists already; choose another folder.")
        return
    if not path.is_file():
        raise HeadshareError(f"{output} holds no run to resume (no {CONFIG}); begin one there.", option="resume")
    changed = [line for line in recipes.difference(recipes.load(path), recipe) if not line.startswith(_FREE)]
    if changed:
        raise HeadshareError(
            f"The recipe differs from that of the run in {output}: {'; '.join(changed)}. Undo the change (the run's "
            f"recipe is {path}), or begin a new run in another folder."
        )
    check_output(output / FINAL, folder=True, overwrite=True)


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
    wait_for_all("prepared")
    if jax.process_index() == 0:
        with new_directory(output) as folder:
            (folder / CONFIG).write_text(recipes.to_yaml(recipe))
            (folder / MAP).write_text(sharing.to_json())
    wait_for_all("begun")


def wait_for_all(name: str) -> None:
    """Returns once every process has come to the place of this name."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)
