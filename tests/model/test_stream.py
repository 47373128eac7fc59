"""Streams give the tokens of `generate`; conversations those of prompts that are read whole."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ALL_VARIANTS, compilations, random_tokens, tiny_model

from headshare_jax import Conversation, HeadshareError, Llama, Sampling, generate, parameters, stream
from headshare_jax.model import generate as generation
from headshare_jax.model import stream as streaming


def windowed(**changes: Any) -> Llama:
    model = tiny_model(eos_token_id=None)
    config = replace(model.config, family="smollm3", sliding_window=10, **changes)
    return Llama(config, {name: model.array(name) for name in parameters.parameter_names(config)})


# What keys and caches depend on: the ring of a window, windows of some layers, angles that follow the length.
MODELS = {
    "plain": tiny_model(eos_token_id=None),
    "window": windowed(),
    "windows": windowed(full_attention_layers=(0, 2)),
    "longrope": tiny_model(eos_token_id=None, **ALL_VARIANTS["phi3, longrope"]),
    "dynamic": tiny_model(eos_token_id=None, **ALL_VARIANTS["dynamic"]),
}
# Every pair is compiled.
CASES = st.sampled_from(
    [
        *((name, Sampling()) for name in MODELS),
        *((name, Sampling(temperature=0.7, top_k=20, top_p=0.9)) for name in ("plain", "longrope")),
    ]
)
prompts = st.lists(st.integers(0, 159), min_size=1, max_size=60)


@pytest.fixture(scope="module", autouse=True)
def _short_pieces() -> Iterator[None]:
    """Conversations read little at a time, into caches that soon have to grow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "READ_TOKENS", (32, 8))
        patch.setattr(streaming, "LEAST_SLOTS", 64)
        yield


@given(case=CASES, prompt=prompts, count=st.integers(2, 64), seed=st.integers(0, 9), stop=st.integers(0, 99))
@hypothesis.settings(max_examples=25)
def test_a_stream_gives_the_tokens_of_generate(
    case: tuple[str, Sampling], prompt: list[int], count: int, seed: int, stop: int
) -> None:
    name, sampling = case
    settings: dict[str, Any] = {"max_new_tokens": count, "sampling": sampling, "seed": seed}
    whole = generate(MODELS[name], [prompt], stop_tokens=[0], **settings)[0]
    stops = [whole[stop]] if stop < len(whole) else [0]
    expected = whole[: whole.index(stops[0])] if stop < len(whole) else whole
    assert list(stream(MODELS[name], prompt, stop_tokens=stops, **settings)) == expected


def test_a_stream_runs_what_generate_compiled() -> None:
    model, prompt = MODELS["plain"], [3, 1, 4]
    generate(model, [prompt], max_new_tokens=40)
    before = compilations(generation.prefill), compilations(generation.decode)
    assert len(list(stream(model, prompt, max_new_tokens=50))) == 50
    assert (compilations(generation.prefill), compilations(generation.decode)) == before


def test_the_first_token_comes_before_others_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = stream(MODELS["plain"], [3, 1, 4], max_new_tokens=40)

    def refused(*args: object, **settings: object) -> None:
        raise AssertionError

    monkeypatch.setattr(streaming, "decode", refused)
    assert next(tokens) == generate(MODELS["plain"], [[3, 1, 4]], max_new_tokens=1)[0][0]


@pytest.mark.parametrize(
    ("prompt", "settings", "reason"),
    [
        ([], {}, "at least one token"),
        ([160], {}, "vocabulary of 160"),
        ([1.0], {}, "whole numbers"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"max_new_tokens": 2.0}, "max_new_tokens"),
        ([1], {"max_new_tokens": 10**30}, "max_new_tokens"),
    ],
)
def test_what_cannot_be_continued_is_refused_at_once(prompt: Any, settings: dict[str, Any], reason: str) -> None:
    model = MODELS["plain"]
    for begin in (partial(stream, model), Conversation(model).answer):
        with pytest.raises(HeadshareError, match=reason):
            begin(prompt, **settings)


def test_a_stop_token_that_no_vocabulary_has_stops_nothing() -> None:
    model = MODELS["plain"]
    assert generate(model, [[1]], stop_tokens=(10**12, -1)) == generate(model, [[1]], stop_tokens=())


def taken(tokens: Iterator[int], count: int) -> list[int]:
    """The first tokens of an answer that is left off there."""
    said = [token for token, _ in zip(tokens, range(count), strict=False)]
    tokens.close()  # type: ignore[attr-defined]
    return said


turn = st.tuples(st.integers(0, 70), st.lists(st.integers(0, 159), min_size=1, max_size=20), st.integers(1, 30))


@given(name=st.sampled_from(["plain", "windows", "longrope"]), turns=st.lists(turn, min_size=2, max_size=4))
@hypothesis.settings(max_examples=15)
def test_a_conversation_answers_as_if_it_had_read_everything(
    name: str, turns: list[tuple[int, Sequence[int], int]]
) -> None:
    model, said = MODELS[name], random_tokens((20,)).tolist()
    conversation = Conversation(model)
    for kept, words, count in turns:
        # What was said before may be changed, too, or forgotten.
        prompt = [*said[:kept], *words]
        expected = generate(model, [prompt], max_new_tokens=30)[0]
        answer = taken(conversation.answer(prompt, max_new_tokens=30), count)
        assert answer == expected[:count]
        said = [*prompt, *answer]


def test_what_was_said_before_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def recorded(model: Llama, tokens: Any, count: Any, *rest: Any, **settings: Any) -> Any:
        read.append(int(count))
        return read_on(model, tokens, count, *rest, **settings)

    read_on = streaming.read_on
    monkeypatch.setattr(streaming, "read_on", recorded)
    conversation, prompt = Conversation(MODELS["plain"]), random_tokens((40,)).tolist()
    answer = list(conversation.answer(prompt, max_new_tokens=30))
    assert read == [32, 8]
    assert len(answer) == 30
    list(conversation.answer([*prompt, *answer, 5, 6], max_new_tokens=30))
    # The last token of an answer is drawn, but not yet read.
    assert read == [32, 8, 3]


def test_a_conversation_goes_on_after_an_error_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, prompt = Conversation(MODELS["plain"]), [3, 1, 4]
    expected = list(conversation.answer(prompt, max_new_tokens=20))
    decode = streaming.decode

    def interrupted(*args: Any, **settings: Any) -> Any:
        decode(*args, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.answer(prompt, max_new_tokens=20))
    monkeypatch.setattr(streaming, "decode", decode)
    assert list(conversation.answer(prompt, max_new_tokens=20)) == expected
