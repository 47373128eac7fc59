"""A model as EleutherAI's evaluation harness (lm-eval) sees it: tasks such as HellaSwag, by their published protocols.

Importing this module needs lm-eval (`pip install 'headshare-jax[eval]'`).
"""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from headshare_jax.convert.hub import is_unreached
from headshare_jax.convert.tokenizer import decode, encode
from headshare_jax.errors import HeadshareError, TryAgain
from headshare_jax.evaluate.perplexity import next_token_scores
from headshare_jax.model.generate import Sampling, generate
from headshare_jax.model.llama import Llama
from headshare_jax.model.mesh import rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows are filled up to multiples of this, so that nearby lengths share one compilation.
_BUCKET = 64


def run_tasks(
    model: Llama,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """Runs tasks of the harness; returns, by task and then by metric, what it reports (without those that are text).

    Args:
      model: dense or shared.
      tokenizer: its tokenizer.
      tasks: names.
      folder: of task files (YAML) that the names are of, instead of the harness's own.
      limit: examples of each task, from its first; all by default.
      batch_size: as of `HarnessModel`.
      max_length: likewise.
      progress: likewise.

    Raises:
      HeadshareError: a task that there is not (the nearest is named), or that cannot be run.
    """
    if limit is not None and limit < 1:
        raise HeadshareError(f"The number of examples must be at least 1, not {limit}.")
    harness_model = HarnessModel(model, tokenizer, batch_size=batch_size, max_length=max_length, progress=progress)
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, 1)
            hint = f"did you mean {near[0]}?" if near else "lm-eval lists its tasks with: lm-eval ls tasks."
            raise HeadshareError(f"There is no task {task!r}{f' in {folder}' if folder else ''}; {hint}")
    try:
        found = simple_evaluate(
            harness_model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            # PyTorch need not be there.
            torch_random_seed=None,
        )
    except HeadshareError:
        raise
    except Exception as error:  # tasks and their data sets have their own ways to fail
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        later = TryAgain if is_unreached(error) else HeadshareError
        raise later(f"The tasks {', '.join(tasks)} cannot be run: {reason}") from error
    return {
        task: {metric.removesuffix(",none"): value for metric, value in values.items() if _is_number(value)}
        for task, values in found["results"].items()
    }


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model with its tokenizer, for `lm_eval.simple_evaluate`.

    Texts are tokenised without special tokens, as the harness does for Hugging Face models; a text without context
    follows the tokenizer's beginning-of-sequence token, or its end-of-sequence token where it has none.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        """Wraps a model.

        Args:
          model: dense or shared.
          tokenizer: its tokenizer.
          batch_size: rows run at a time; of a model on a mesh a multiple of the mesh's rows, at least so many.
          max_length: tokens that a prediction may rest on, the last ones; by default the model's context.
          progress: called with the rows done and in all, of each kind of request.

        Raises:
          HeadshareError: an impossible batch size or length, or a tokenizer without those tokens.
        """
        super().__init__()
        context = model.config.max_position_embeddings
        self.max_length = context if max_length is None else max_length
        if batch_size < 1 or not 2 <= self.max_length <= context:
            raise HeadshareError(
                f"The batch size ({batch_size}) must be at least 1, and the length ({self.max_length}) from 2 to the "
                f"model's context of {context}."
            )
        if tokenizer.eos_token_id is None:
            raise HeadshareError("The tokenizer has no end-of-sequence token, which the tasks need.")
        self.model, self.tokenizer, self.progress = model, tokenizer, progress
        self.batch_size = batch_size + -batch_size % rows_of(model.mesh)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return encode(self.tokenizer, string, special=bool(add_special_tokens))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = np.zeros(len(requests))
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return [float(total) for total in totals]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers = []
        for number, request in enumerate(requests, 1):
            context, given = request.args
            settings = normalize_gen_kwargs(given)
            new = min(settings["max_gen_toks"], self.max_length - 1)
            prompt = self.tok_encode(context)[new - self.max_length :] or [self.prefix_token_id]
            sampling = Sampling(settings["temperature"], settings.get("top_k"), settings.get("top_p", 1.0))
            stops = [self.eot_token_id, *self.model.config.eos_token_ids]
            (tokens,) = generate(self.model, [prompt], max_new_tokens=new, sampling=sampling, stop_tokens=stops)
            answer = decode(self.tokenizer, tokens)
            for end in filter(None, settings["until"]):
                answer = answer.split(end)[0]
            answers.append(answer)
            self.progress(number, len(requests))
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (_, context, continuation): its log-likelihood, and whether greedy decoding would give it."""
        # The last token is predicted, and has no place in the context.
        room = self.max_length + 1
        rows = [((context + continuation)[-room:], len(continuation)) for _, context, continuation in requests]
        found = [(0.0, True)] * len(rows)
        # Rows of like length run together; the longest first, so that memory runs out at once or not at all.
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))
        for begin in range(0, len(order), self.batch_size):
            chosen = order[begin : begin + self.batch_size]
            longest = len(rows[chosen[0]][0])
            width = min(-(-longest // _BUCKET) * _BUCKET, room)
            batch = np.zeros((self.batch_size, width), np.int32)
            for place, number in enumerate(chosen):
                batch[place, : len(rows[number][0])] = rows[number][0]
            nll_bt, greedy_bt = next_token_scores(self.model, batch)
            for place, number in enumerate(chosen):
                tokens, scored = rows[number]
                span = slice(len(tokens) - 1 - min(scored, len(tokens) - 1), len(tokens) - 1)
                found[number] = (-float(nll_bt[place, span].sum(dtype=np.float64)), bool(greedy_bt[place, span].all()))
            self.progress(begin + len(chosen), len(rows))
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
