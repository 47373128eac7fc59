"""`headshare generate`."""

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import RenderableType
from rich.text import Text

from headshare_jax import convert
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Source
from headshare_jax.cli.drawing import Drawing, kept, prompt_tokens, tell_context, write
from headshare_jax.convert import tokenizer as tokenizers
from headshare_jax.errors import HeadshareError
from headshare_jax.generation import pieces
from headshare_jax.loading import load_tokenizer
from headshare_jax.model.generate import generate
from headshare_jax.model.stream import stream
from headshare_jax.report.console import console
from headshare_jax.signals import handled


@dataclass(frozen=True, kw_only=True)
class Generate(Drawing):
    """Continue one or more prompts.

    A single answer appears on a terminal as it is written.

    Example: headshare generate smollm2-shared "The capital of France is" --max-new-tokens 20

    Attributes:
      prompt: The same as prompts, as an option.
      chat: Treat each prompt as a message to a chat model.
    """

    src: Source
    prompts: Annotated[
        tyro.conf.Positional[tuple[kinds.Words, ...]],
        tyro.conf.arg(metavar="[PROMPT ...]", help="One prompt or several."),
    ] = ()
    prompt: Annotated[tuple[kinds.Words, ...], tyro.conf.arg(metavar="TEXT ...")] = ()
    chat: bool = False

    def run(self) -> dict[str, Any]:
        texts = (*self.prompts, *self.prompt)
        if not texts:
            raise HeadshareError('Give a prompt, such as headshare generate MODEL "Once upon a time".')
        path = convert.locate(self.src)
        sampling, most = self.drawn(path, usual=64)
        tokenizer = load_tokenizer(path)
        prompts = [prompt_tokens(self.src, tokenizer, text, chat=self.chat) for text in texts]
        model = self.loaded(self.src, path)
        tell_context(max(map(len, prompts)) + most, model)
        settings: dict[str, Any] = {"max_new_tokens": most, "sampling": sampling, "seed": self.seed}
        if self._streams:
            console().print(Text(texts[0], "bold"), end="\n" if self.chat else "")
            answer: list[int] = []
            for piece in pieces(tokenizer, kept(stream(model, prompts[0], **settings), answer)):
                write(piece)
            write("\n")
            answers = [answer]
        else:
            # Handlers would wait for the compiled loop; nothing is being written meanwhile.
            with handled(signal.SIG_DFL):
                answers = generate(model, prompts, **settings)
        return {
            "results": [
                {"prompt": text, "text": tokenizers.decode(tokenizer, answer), "tokens": answer}
                for text, answer in zip(texts, answers, strict=True)
            ]
        }

    @property
    def _streams(self) -> bool:
        return not self.json and len(self.prompts) + len(self.prompt) == 1 and sys.stdout.isatty()

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        if self._streams:
            return
        for entry in result["results"]:
            yield Text.assemble((entry["prompt"], "bold"), "\n" if self.chat else "", entry["text"])
