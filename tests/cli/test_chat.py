"""The commands that let a model write: chats, streams, comparisons, and how the checkpoint says to draw."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_cli_model

import headshare_jax as hs
from headshare_jax import cli
from headshare_jax.convert import tokenizer as tokenizers
from headshare_jax.model import stream as streaming


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for a chat of some turns."""
    return tiny_cli_model.saved_without_torch(
        tmp_path_factory.mktemp("models") / "roomy", max_position_embeddings=256, eos_token_id=None
    )


class Piped(io.StringIO):
    """Lines on standard input."""

    encoding = "utf-8"


@pytest.fixture
def chat(headshare: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chats through a pipe; returns the turns."""

    def call(model: Path, lines: str, *args: object) -> Any:
        monkeypatch.setattr(sys, "stdin", Piped(lines))
        return headshare("chat", model, "--json", *args)["turns"]

    return call


def test_a_chat_shows_the_model_all_that_was_said(chat: Any, roomy: Path) -> None:
    turns = chat(roomy, "Hello\n\nAgain\nAnd again", "--max-new-tokens", 7, "--system", "Be brief")
    model, tokenizer = hs.load(roomy), hs.load_tokenizer(roomy)
    messages = [{"role": "system", "content": "Be brief"}]
    for turn, message in zip(turns, ("Hello", "Again", "And again"), strict=True):
        messages.append({"role": "user", "content": message})
        expected = hs.generate(model, [tokenizers.chat(tokenizer, messages)], max_new_tokens=7)[0]
        text = tokenizer.decode(expected, skip_special_tokens=True)
        assert turn == {"message": message, "text": text, "tokens": 7, "end": "length"}
        messages.append({"role": "assistant", "content": text})


def test_a_chat_shows_its_answers_and_ends_at_exit(
    headshare: Any, chat: Any, roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = chat(roomy, "Hello\nAgain\n", "--max-new-tokens", 7)
    monkeypatch.setattr(sys, "stdin", Piped("Hello\nAgain\n/exit\nOnce more\n"))
    printed = headshare("chat", roomy, "--max-new-tokens", 7)
    shown = "".join(char for turn in turns for char in turn["text"] + "\n\n" if char in "\n\t" or char.isprintable())
    assert "".join(char for char in printed if char in "\n\t" or char.isprintable()) == shown


def test_the_oldest_turns_of_a_long_chat_are_forgotten(
    chat: Any, refused: Any, roomy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = chat(roomy, f"{'a' * 90}\n{'b' * 90}\n{'c' * 90}\n", "--max-new-tokens", 20, "--system", "Be brief")
    assert [turn["tokens"] for turn in turns] == [20, 20, 20]
    monkeypatch.setattr(sys, "stdin", Piped(f"{'a' * 90}\n{'b' * 90}\n"))
    assert cli.run(["chat", str(roomy), "--max-new-tokens", "99"]) == 0
    assert capsys.readouterr().err.count("first 2 messages are forgotten") == 1
    monkeypatch.setattr(sys, "stdin", Piped("Hello\n" + "x" * 300))
    assert cli.run(["chat", str(roomy)]) == 2
    assert "context 256; give a shorter one" in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    chat: Any, roomy: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # Tests that run in a shell's background ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    whole = chat(roomy, "Hello\nAgain\n", "--max-new-tokens", 30)
    answer = streaming.Conversation.answer

    def interrupted(*args: Any, **settings: Any) -> Iterator[int]:
        for place, token in enumerate(answer(*args, **settings)):
            if place == 5:
                os.kill(os.getpid(), signal.SIGINT)
            yield token

    monkeypatch.setattr(streaming.Conversation, "answer", interrupted)
    turns = chat(roomy, "Hello\nAgain\n", "--max-new-tokens", 30)
    assert [(turn["tokens"], turn["end"]) for turn in turns] == [(5, "interrupt")] * 2
    assert whole[0]["text"].startswith(turns[0]["text"].rstrip("\ufffd"))


def test_a_chat_on_a_terminal(roomy: Path) -> None:
    main, side = pty.openpty()
    command = [sys.executable, "-m", "headshare_jax", "chat", str(roomy), "--max-new-tokens", "5"]
    # A process inherits that Ctrl-C is ignored, as it is by tests in a shell's background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=os.environ | {"TERM": "dumb"})
    signal.signal(signal.SIGINT, before)
    os.close(side)
    said = b""

    def appears(text: bytes, count: int, seconds: float = 120) -> bool:
        nonlocal said
        end = time.monotonic() + seconds
        while said.count(text) < count and time.monotonic() < end:
            if select.select([main], [], [], 0.2)[0]:
                said += os.read(main, 4096)
        return said.count(text) >= count

    try:
        assert appears(b"> ", 1), said
        os.write(main, b"Hello\n")
        assert appears(b"stopped after 5 tokens", 1), said
        assert appears(b"> ", 2), said
        # Python hears no signal between its prompt and its wait for a key.
        for _ in range(40):
            process.send_signal(signal.SIGINT)
            if appears(b"ends the chat", 2, seconds=3):
                break
        assert appears(b"> ", 3), said
        os.write(main, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--top-k", 5), "without a --temperature above 0"),
        (("--seed", 5), "without a --temperature above 0"),
        (("--max-new-tokens", 0), "--max-new-tokens"),
        (("--temperature", -1), "--temperature"),
    ],
)
def test_what_a_chat_cannot_do_is_refused(refused: Any, roomy: Path, args: tuple[object, ...], reason: str) -> None:
    assert reason in refused("chat", roomy, *args)


def test_a_model_without_a_chat_template_is_refused(refused: Any, roomy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(roomy, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for template, reason in ((None, "has no chat template"), ("{{ raise_exception('no system') }}", "chat template")):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        assert reason in refused("chat", folder)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_input_that_is_no_text_is_refused(
    refused: Any, roomy: Path, monkeypatch: pytest.MonkeyPatch, errors: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), "utf-8", errors))
    assert re.search("must be .*UTF-8", refused("chat", roomy))


def test_the_files_own_way_to_draw_is_the_default(headshare: Any, roomy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    shutil.copytree(roomy, folder)
    fields = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "max_new_tokens": 9}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    model, prompt = hs.load(folder), hs.load_tokenizer(folder)("Once").input_ids

    def tokens(*args: object) -> list[int]:
        return headshare("generate", folder, "Once", "--json", *args)["results"][0]["tokens"]

    expected = hs.generate(model, [prompt], max_new_tokens=9, sampling=hs.load_sampling(folder), seed=3)[0]
    assert tokens("--seed", 3) == expected
    assert tokens("--temperature", 0) == hs.generate(model, [prompt], max_new_tokens=9)[0]
    own = hs.Sampling(0.9, 5, 0.95)
    assert (
        tokens("--top-k", 5, "--max-new-tokens", 4) == hs.generate(model, [prompt], max_new_tokens=4, sampling=own)[0]
    )


def test_a_single_answer_streams_on_a_terminal(headshare: Any, roomy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("generate", roomy, "Größe", "--max-new-tokens", 20)
    whole = headshare(*args, "--json")["results"][0]["text"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    printed = headshare(*args)
    shown = "".join(char for char in whole if char in "\n\t" or char.isprintable())
    assert "Größe" in printed
    assert shown in "".join(char for char in printed if char in "\n\t" or char.isprintable())


def test_two_models_are_compared(headshare: Any, refused: Any, roomy: Path, text: Path, tmp_path: Path) -> None:
    headshare("share", roomy, tmp_path / "shared", "--ratio", 0.5, "--method", "direct")
    args = ("compare", roomy, tmp_path / "shared", "Once", "The sea", "--max-new-tokens", 6)
    result = headshare(*args, "--text", text, "--seq-len", 64, "--windows", 4, "--json")
    for place, path in enumerate((roomy, tmp_path / "shared")):
        alone = headshare("generate", path, "Once", "The sea", "--max-new-tokens", 6, "--json")["results"]
        assert [entry["answers"][place] for entry in result["answers"]] == [entry["text"] for entry in alone]
    tokens = hs.load_tokenizer(roomy)(text.read_text()).input_ids
    windows = hs.calibration_windows(tokens, 4, 64, 259)
    found = hs.agreement(hs.open_checkpoint(roomy), hs.open_checkpoint(tmp_path / "shared"), windows)
    assert result["agreement"]["kl"] == found.kl
    assert result["agreement"]["before"] == found.before
    printed = headshare(*args, "--text", text, "--seq-len", 64, "--windows", 4)
    assert str(found) in printed
    assert "The sea" in printed
    assert len(headshare("compare", roomy, roomy, "--max-new-tokens", 2, "--json")["answers"]) == 3
    assert "does nothing without --text" in refused("compare", roomy, roomy, "--windows", 3)
