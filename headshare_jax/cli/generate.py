"""`headshare generate`."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import tyro
from rich.console import RenderableType
from rich.text import Text

from headshare_jax import convert
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command, ComputeDtype, Source
from headshare_jax.convert.cache import cache_directory
from headshare_jax.convert.tokenizer import chat_message, decode, encode
from headshare_jax.errors import HeadshareError
from headshare_jax.loading import load, load_tokenizer
from headshare_jax.model.generate import Sampling, generate
from headshare_jax.report.progress import say
from headshare_jax.signals import handled


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue one or more prompts.

    Example: headshare generate smollm2-shared --prompt "The capital of France is" --max-new-tokens 20

    Attributes:
      prompt: One prompt or several.
      max_new_tokens: Most tokens to add to each prompt.
      temperature: 0 always takes the most likely token.
      top_k: Draw among the k most likely tokens only.
      top_p: Draw among the most likely tokens of this total probability.
      seed: Seed of the draws.
      chat: Treat each prompt as a message to a chat model.
      dtype: Type to hold the weights in: float32, bfloat16 or float16; the checkpoint's own by default, but float32 on
        a CPU, which decodes slowly from 16 bits.
    """

    src: Source
    prompt: Annotated[tuple[kinds.Words, ...], tyro.conf.arg(metavar="TEXT ...")]
    max_new_tokens: kinds.Count = 64
    temperature: kinds.NotNegative = 0.0
    top_k: kinds.Count | None = None
    top_p: kinds.Budget = 1.0
    seed: kinds.Seed = 0
    chat: bool = False
    compute_dtype: ComputeDtype = "float32"
    dtype: kinds.Dtype | None = None

    def run(self) -> dict[str, Any]:
        if self.temperature == 0:
            self.refuse("top_k", "top_p", "seed", without="a --temperature above 0")
        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        path = convert.locate(self.src)
        tokenizer = load_tokenizer(path)
        if self.chat and tokenizer.chat_template is None:
            raise HeadshareError(f"The tokenizer of {self.src} has no chat template; leave --chat out.")
        prompts = [chat_message(tokenizer, text) if self.chat else encode(tokenizer, text) for text in self.prompt]
        if not prompts or not all(prompts):
            raise HeadshareError("Every prompt must hold at least one token; give --prompt a text.")
        say(f"loading {self.src}")
        keep_compiled()
        # XLA's CPU backend converts 16-bit weights anew for every token.
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else None)
        model = load(path, dtype=dtype, compute_dtype=self.compute_dtype)
        longest, context = max(map(len, prompts)) + self.max_new_tokens, model.config.max_position_embeddings
        if longest > context:
            say(f"a prompt with its new tokens may be {longest} tokens long; the model was made for up to {context}")
        # Handlers would wait for the compiled loop; nothing is being written meanwhile.
        with handled(signal.SIG_DFL):
            answers = generate(model, prompts, max_new_tokens=self.max_new_tokens, sampling=sampling, seed=self.seed)
        return {
            "results": [
                {"prompt": prompt, "text": decode(tokenizer, answer), "tokens": answer}
                for prompt, answer in zip(self.prompt, answers, strict=True)
            ]
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        for entry in result["results"]:
            yield Text.assemble((entry["prompt"], "bold"), "\n" if self.chat else "", entry["text"])


def keep_compiled() -> None:
    """Keeps what is compiled in the cache folder, so that later commands start without compiling.

    A folder that the user gave JAX stays in force, and where none can be made nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_directory() / "compiled"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
