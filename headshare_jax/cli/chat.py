"""`headshare chat`."""

import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from headshare_jax import convert
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Source
from headshare_jax.cli.drawing import Drawing, check_template, write
from headshare_jax.convert import tokenizer as tokenizers
from headshare_jax.errors import HeadshareError
from headshare_jax.generation import pieces
from headshare_jax.loading import load_tokenizer
from headshare_jax.model.generate import Sampling
from headshare_jax.model.stream import Conversation
from headshare_jax.report.progress import say
from headshare_jax.signals import handled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END = "/exit"
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Chat(Drawing):
    """Talk with a model, which answers as its own chat template has it.

    Ctrl-C stops an answer; Ctrl-D or /exit ends the chat. Through a pipe, each line is a message.

    Example: headshare chat smollm2-shared

    Attributes:
      system: What to tell the model before the first message.
    """

    src: Source
    system: kinds.Words | None = None

    def run(self) -> dict[str, Any]:
        path = convert.locate(self.src)
        sampling, most = self.drawn(path, usual=512)
        tokenizer = load_tokenizer(path)
        check_template(self.src, tokenizer, "use generate instead")
        opening = [] if self.system is None else [_message("system", self.system)]
        # A template that fails, such as one that takes no system message, does so before the model is loaded.
        tokenizers.chat(tokenizer, [*opening, _message("user", "Hello")])
        model = self.loaded(self.src, path)
        talk = _Talk(Conversation(model), tokenizer, sampling, most, self.seed, opening)
        with handled(talk.interrupts):
            for message in _messages():
                turn = talk.said(message, (lambda piece: None) if self.json else write)
                if turn is not None and not self.json:
                    write("\n\n")
        return {"turns": talk.turns}

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        yield from ()


class _Interrupts:
    """The handler of signals: Ctrl-C stops an answer, and anything else, or a second Ctrl-C, what Python is doing."""

    def __init__(self) -> None:
        self.answering = self.stopped = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT or not self.answering or self.stopped:
            raise KeyboardInterrupt(number)
        self.stopped = True


@dataclass
class _Talk:
    """A chat so far.

    Attributes:
      conversation, tokenizer: of the model.
      sampling, most, seed: how tokens are drawn, and how many for an answer.
      messages: that the model is shown.
      turns: all of them, as plain data.
      interrupts: the handler of signals meanwhile.
    """

    conversation: Conversation
    tokenizer: "PreTrainedTokenizerBase"
    sampling: Sampling
    most: int
    seed: int
    messages: list[Message]
    turns: list[dict[str, Any]] = field(default_factory=list)
    interrupts: _Interrupts = field(default_factory=_Interrupts)

    def said(self, message: str, show: Callable[[str], None]) -> dict[str, Any] | None:
        """Answers a message, showing the answer piece by piece; the turn, or None where there can be none."""
        try:
            kinds.checked(kinds.Words, message, "The message")
            prompt, forgotten = self._prompt(message)
        except HeadshareError as error:
            if not sys.stdin.isatty():
                raise
            say(str(error))
            return None
        if forgotten:
            say(f"(The conversation is longer than the model's context: its first {forgotten} messages are forgotten.)")
        room = min(self.most, self._context - len(prompt))
        seed = (self.seed + len(self.turns)) % 2**32
        tokens = self.conversation.answer(prompt, max_new_tokens=room, sampling=self.sampling, seed=seed)
        answer: list[int] = []
        self.interrupts.answering, self.interrupts.stopped = True, False
        try:
            for piece in pieces(self.tokenizer, self._until_stopped(tokens, answer)):
                show(piece)
        finally:
            self.interrupts.answering = False
        end = "interrupt" if self.interrupts.stopped else "length" if len(answer) == room else "stop"
        if end == "interrupt":
            say("(stopped)")
        elif end == "length":
            say(f"(stopped after {room} tokens)")
        text = tokenizers.decode(self.tokenizer, answer)
        self.messages.append(_message("assistant", text))
        self.turns.append({"message": message, "text": text, "tokens": len(answer), "end": end})
        return self.turns[-1]

    @property
    def _context(self) -> int:
        return self.conversation.model.config.max_position_embeddings

    def _prompt(self, message: str) -> tuple[list[int], int]:
        """Token ids of what the model is shown, and how many of the oldest messages there was no room for."""
        messages, forgotten = [*self.messages, _message("user", message)], 0
        first = sum(each["role"] == "system" for each in messages)
        while True:
            prompt = tokenizers.chat(self.tokenizer, messages)
            if len(prompt) + min(self.most, self._context // 4) <= self._context:
                break
            if len(messages) == first + 1:
                if len(prompt) < self._context:
                    break
                raise HeadshareError(
                    f"The message is {len(prompt)} tokens long, and the model's context {self._context}; give a "
                    "shorter one."
                )
            del messages[first : first + 2]
            forgotten += 2
        self.messages = messages
        return prompt, forgotten

    def _until_stopped(self, tokens: Iterator[int], answer: list[int]) -> Iterator[int]:
        for token in tokens:
            if self.interrupts.stopped:
                return
            answer.append(token)
            yield token


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _messages() -> Iterator[str]:
    """What the user says, until the input ends."""
    for line in _lines():
        if line.strip() == _END:
            return
        if line.strip():
            yield line.strip()


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise HeadshareError(f"The input must be text in {sys.stdin.encoding.upper()} ({error}).") from error
        return
    with suppress(ImportError):
        # Where it is there, `input` edits lines with it.
        importlib.import_module("readline")
    say(f"Ctrl-C stops an answer; Ctrl-D or {_END} ends the chat.")
    while True:
        try:
            yield input("> " if sys.stdout.isatty() else "")
        except EOFError:
            print()
            return
        except KeyboardInterrupt as stop:
            if stop.args[:1] != (signal.SIGINT,):
                raise
            say(f"\n(Ctrl-D or {_END} ends the chat.)")
