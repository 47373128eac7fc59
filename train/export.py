"""The end of a run: the shared model is written, with what the run came to."""

from dataclasses import asdict
from functools import partial
from typing import Any

import jax

from headshare_jax import convert
from headshare_jax.processes.agreement import wait_for_all
from headshare_jax.sharing.view import cast
from headshare_jax.train import run_folder
from headshare_jax.train.current import Current
from headshare_jax.train.held_out import HeldOut
from headshare_jax.train.metrics import SPEEDS
from headshare_jax.train.placement import gathered


def export(current: Current, held_out: HeldOut, last: dict[str, Any]) -> dict[str, Any]:
    """Writes the shared model, in the source's type, with its tokenizer.

    Args:
      current: the last stage, all its steps done.
      held_out: the text to measure it on.
      last: what the run came to so far.

    Returns:
      `last` and what was measured here.
    """
    task, finished = current.task, current.finished("tied")
    if held_out:
        last["start_perplexity"] = held_out.start_perplexity
    if current.stage.kind == "align" and task.recipe.sharing.refit_windows and "shared_perplexity" in last:
        last["shared_perplexity"] = held_out.perplexity(current.placed(finished))
    dtype = convert.output_dtype(task.source, "native") or str(task.source.dtype("embed_vd"))
    progress = partial(current.progress, "comparing with the dense model")
    found = held_out.agreement(task.source, cast(finished, dtype), task.mesh, progress)
    last["agreement"] = None if found is None else asdict(found)
    whole = cast(finished if jax.process_count() == 1 else gathered(current.placed(finished)), dtype)
    if jax.process_index() == 0:
        convert.save(
            whole,
            task.output / run_folder.FINAL,
            tokenizer_from=task.source.path,
            overwrite=True,
            # Without times, so that the same run gives the same bytes.
            provenance={
                "source": task.recipe.model,
                "postshare": {name: value for name, value in last.items() if name not in SPEEDS},
            },
        )
    wait_for_all("exported")
    return last
