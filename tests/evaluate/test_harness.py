"""The evaluation harness's view of a model, against transformers; and a task of our own through the command."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cli_model
import torch
import transformers
from lm_eval.api.instance import Instance
from support import hf_logits

import headshare_jax as hs
from headshare_jax import HeadshareError, cli
from headshare_jax.evaluate.harness import HarnessModel, run_tasks

CONTEXT = 24
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/colours.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "green", "loud"], "answer": 0},
    {"question": "Grass is", "choices": ["red", "green"], "answer": 1},
    {"question": "Snow is", "choices": ["black", "hot", "white"], "answer": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context is short, and a task."""
    folder = tmp_path_factory.mktemp("harness")
    tiny_cli_model.saved(folder / "model", max_position_embeddings=CONTEXT)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "colours.yaml").write_text(TASK.format(folder=folder))
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return folder


@pytest.fixture(scope="module")
def words(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def ours(folder: Path, words: Any) -> HarnessModel:
    return HarnessModel(hs.load(folder / "model"), words, batch_size=2)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model")


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def scores(model: Any, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood of every token but the first, and the token that is most likely there."""
    logits = torch.as_tensor(hf_logits(model, np.array([tokens[:-1]]))[0]).double()
    values = logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
    return values.numpy(), logits.argmax(-1).numpy()


def test_continuations_have_the_likelihoods_of_transformers(ours: HarnessModel, theirs: Any, words: Any) -> None:
    pairs = [("The sky is", " blue"), ("Snow", " is as white as the moon"), ("", "Grass"), ("A long story", " x")]
    found = ours.loglikelihood(requests("loglikelihood", *pairs))
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        before = words(context).input_ids or [words.bos_token_id]
        tokens = (before + words(continuation).input_ids)[-CONTEXT - 1 :]
        expected, _ = scores(theirs, tokens)
        assert value == pytest.approx(expected[-len(continuation) :].sum(), rel=1e-5)


def test_what_greedy_decoding_would_say_is_told(ours: HarnessModel, theirs: Any, words: Any) -> None:
    context = words("The sky").input_ids
    _, likely = scores(theirs, [*context, 0])
    (_, greedy), (_, other) = ours._loglikelihood_tokens(
        [(None, context, [int(likely[-1])]), (None, context, [int(likely[-1]) ^ 1])]
    )
    assert (greedy, other) == (True, False)


def test_long_texts_are_scored_in_windows_each_token_once(ours: HarnessModel, theirs: Any, words: Any) -> None:
    text = "Whoever reads this has more than one window to go through."
    (found,) = ours.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    tokens = [words.bos_token_id, *words(text).input_ids]
    whole, total = len(tokens) - 1, 0.0
    for first in range(0, whole, CONTEXT):
        last = min(first + CONTEXT, whole)
        values, _ = scores(theirs, tokens[max(0, last - CONTEXT) : last + 1])
        total += values[first - last :].sum()
    assert found == pytest.approx(total, rel=1e-5)


def test_answers_end_before_what_ends_them(ours: HarnessModel, words: Any) -> None:
    prompt = words("Snow").input_ids
    whole = words.decode(hs.generate(ours.model, [prompt], max_new_tokens=8)[0], skip_special_tokens=True)
    ending = whole[2]
    settings = {"max_gen_toks": 8, "do_sample": False}
    found = ours.generate_until(
        requests("generate_until", ("Snow", settings | {"until": []}), ("Snow", settings | {"until": ending}))
    )
    assert found == [whole, whole.split(ending)[0]]


def test_a_task_through_the_command(
    folder: Path, theirs: Any, words: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    args = ["eval", str(folder / "model"), "--tasks", "colours", "--task-folder", str(folder / "tasks")]
    assert cli.run([*args, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tasks"].values()
    right = 0
    for row in QUESTIONS:
        question: Any = row["question"]
        tokens = [words(f"{question} {choice}").input_ids for choice in row["choices"]]  # type: ignore[attr-defined]
        values = [scores(theirs, each)[0][len(question) - 1 :].sum() for each in tokens]
        right += int(np.argmax(values)) == row["answer"]
    assert found["acc"] == pytest.approx(right / len(QUESTIONS))
    assert found["sample_len"] == len(QUESTIONS)
    assert cli.run([*args, "--task-limit", "1"]) == 0
    assert "colours" in capsys.readouterr().out


def test_impossible_tasks_are_refused(folder: Path, ours: HarnessModel, words: Any, tmp_path: Path) -> None:
    tasks = folder / "tasks"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tasks": ["colors"]}, "no task 'colors' in .*did you mean colours"),
        ({"limit": 0}, "at least 1"),
        ({"batch_size": 0}, "batch size"),
        ({"max_length": CONTEXT + 1}, "context of 24"),
    ]
    for changes, said in cases:
        settings = {"tasks": ["colours"], "folder": tasks} | changes
        with pytest.raises(HeadshareError, match=said):
            run_tasks(ours.model, words, **settings)
    (tmp_path / "broken.yaml").write_text(TASK.format(folder=tmp_path))
    with pytest.raises(HeadshareError, match="The tasks colours cannot be run"):
        run_tasks(ours.model, words, ["colours"], folder=tmp_path)


def test_a_missing_package_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "headshare_jax.evaluate.harness", None)
    monkeypatch.delattr("headshare_jax.evaluate.harness")
    assert cli.run(["eval", str(folder / "model"), "--tasks", "piqa"]) == 2
    assert "pip install 'headshare-jax[eval]'" in capsys.readouterr().err
