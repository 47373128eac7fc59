"""What commands that let a model write have in common: how tokens are drawn, the model, and text on a terminal."""

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command, ComputeDtype, MeshSizes
from headshare_jax.convert import tokenizer as tokenizers
from headshare_jax.errors import HeadshareError
from headshare_jax.generation import chosen
from headshare_jax.loading import load
from headshare_jax.model.generate import Sampling
from headshare_jax.model.llama import Llama
from headshare_jax.model.mesh import local_mesh
from headshare_jax.report.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Drawing(Command):
    """A command that lets a model write.

    Attributes:
      max_new_tokens: Most tokens to add; else what the model's generation_config.json says, or 64 (in a chat 512).
      temperature: 0 always takes the most likely token. This and the next two are by default as the model's
        generation_config.json says; without one, 0.
      top_k: Draw among the k most likely tokens only.
      top_p: Draw among the most likely tokens of this total probability.
      seed: Seed of the draws.
      dtype: Type to hold the weights in: float32, bfloat16 or float16; the checkpoint's own by default, but float32 on
        a CPU, which decodes slowly from 16 bits.
    """

    max_new_tokens: kinds.Count | None = None
    temperature: kinds.NotNegative | None = None
    top_k: kinds.Count | None = None
    top_p: kinds.Budget | None = None
    seed: kinds.Seed = 0
    compute_dtype: ComputeDtype = "float32"
    dtype: kinds.Dtype | None = None
    mesh: MeshSizes = None

    def drawn(self, path: Path, usual: int) -> tuple[Sampling, int]:
        """How to draw tokens of a checkpoint's model, and how many at most."""
        sampling, most = chosen(
            path,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
        if sampling.temperature == 0:
            self.refuse("top_k", "top_p", "seed", without="a --temperature above 0")
        return sampling, most or usual

    def loaded(self, src: str, path: Path) -> Llama:
        """A checkpoint's model."""
        say(f"loading {src}")
        # XLA's CPU backend converts 16-bit weights anew for every token.
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else None)
        # Weights that are cut over tensor stay where they are while tokens are added.
        mesh = local_mesh(self.mesh, usual=(1, 1, -1))
        return load(path, dtype=dtype, compute_dtype=self.compute_dtype, mesh=mesh)


def prompt_tokens(src: str, tokenizer: "PreTrainedTokenizerBase", text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt, or of a message to a chat model; raises HeadshareError if there are none."""
    if chat:
        check_template(src, tokenizer, "leave --chat out")
        return tokenizers.chat_message(tokenizer, text)
    tokens = tokenizers.encode(tokenizer, text)
    if not tokens:
        raise HeadshareError("Every prompt must hold at least one token; give it a text.")
    return tokens


def check_template(src: str, tokenizer: "PreTrainedTokenizerBase", remedy: str) -> None:
    """Raises HeadshareError if a tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise HeadshareError(f"The tokenizer of {src} has no chat template; {remedy}.")


def tell_context(longest: int, model: Llama) -> None:
    """Says that a text may become longer than what the model was made for, if so."""
    context = model.config.max_position_embeddings
    if longest > context:
        say(f"a prompt with its new tokens may be {longest} tokens long; the model was made for up to {context}")


def kept(tokens: Iterable[int], answer: list[int]) -> Iterator[int]:
    """The tokens, each also added to an answer."""
    for token in tokens:
        answer.append(token)
        yield token


def write(piece: str) -> None:
    """Shows a piece of a model's text at once; what would command a terminal is left out."""
    sys.stdout.write("".join(char for char in piece if char in "\n\t" or unicodedata.category(char) != "Cc"))
    sys.stdout.flush()
