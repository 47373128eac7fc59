"""The end of a run: the shared model is written, with what the run came to."""

from dataclasses import asdict
from functools import partial
from typing import Any

from headshare_jax import convert
from headshare_jax.model.lent import lent
from headshare_jax.processes.agreement import together
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import cast
from headshare_jax.train import run_folder
from headshare_jax.train.current import Current
from headshare_jax.train.held_out import HeldOut
from headshare_jax.train.metrics import SPEEDS


def export(current: Current, held_out: HeldOut, last: dict[str, Any]) -> dict[str, Any]:
    """Writes the shared model as the recipe's `final` says, with its tokenizer.

    Args:
      current: the last stage, all its steps done.
      held_out: the text to measure it on.
      last: what the run came to so far.

    Returns:
      `last` and what was measured here.
    """
    task = current.task
    finished: WeightSource = current.finished("tied")
    if held_out:
        last["start_perplexity"] = held_out.start_perplexity
    if current.stage.kind == "align" and task.recipe.sharing.refit_windows:
        # Fitted weights lie beside the model, which makes room for a whole one.
        current.forget_optimizer()
        finished = current.placed(finished)
        if "shared_perplexity" in last:
            last["shared_perplexity"] = held_out.perplexity(finished)
    how, source, dtype = task.recipe.final, task.source, current.final_dtype
    progress = partial(current.progress, "comparing with the dense model")
    found = held_out.agreement(source, cast(finished, dtype), task.mesh, progress)
    last["agreement"] = None if found is None else asdict(found)
    with together("export"), lent(finished, dtype) as mine:
        if mine is not None:
            convert.save(
                mine,
                run_folder.final(task.output, task.recipe),
                to=how.to,
                quantize=how.quantize,
                tokenizer_from=source.path,
                overwrite=True,
                # Without times, so that the same run gives the same bytes.
                provenance={
                    "source": task.recipe.model,
                    "postshare": {name: value for name, value in last.items() if name not in SPEEDS},
                },
            )
    return last
