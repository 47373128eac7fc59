"""Generation in texts, by a model's tokenizer, and drawn as the model's maker chose."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from jax.sharding import Mesh

from headshare_jax import convert
from headshare_jax.convert import generation_config
from headshare_jax.convert import tokenizer as tokenizers
from headshare_jax.errors import HeadshareError
from headshare_jax.loading import AnyTokenizer, tokenizer_of
from headshare_jax.model import generate as ids
from headshare_jax.model import stream as streams
from headshare_jax.model.generate import Sampling
from headshare_jax.model.llama import Llama

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a decoder makes of the first bytes of a character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@overload
def generate(model: Llama, prompts: str, *, tokenizer: AnyTokenizer | None = None, **settings: Any) -> str: ...
@overload
def generate(
    model: Llama, prompts: list[str], *, tokenizer: AnyTokenizer | None = None, **settings: Any
) -> list[str]: ...
@overload
def generate(
    model: Llama, prompts: Sequence[Sequence[int]], *, tokenizer: AnyTokenizer | None = None, **settings: Any
) -> list[list[int]]: ...
def generate(  # type: ignore[misc]  # what settings are is said once
    model: Llama,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: AnyTokenizer | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> str | list[str] | list[list[int]]:
    """Continues a text, several texts, or prompts of token ids; all are continued together.

    Compiles once for each batch size and bucket of lengths. Where the longest row leaves the original context of
    `longrope` scaling, whose other factors then turn all keys, everything so far is read again.

    Args:
      model: dense or shared.
      prompts: a text or a list of texts; or lists of token ids, at least one in each.
      tokenizer: for texts: the model's tokenizer, or the name of the checkpoint that has it.
      max_new_tokens: most tokens to add to each prompt.
      sampling: greedy by default; `load_sampling` gives what the checkpoint's maker chose.
      stop_tokens: a row ends before the first of these; by default the model's end-of-sequence tokens.
      seed: of the draws.
      mesh: devices to run on (`model.mesh.make_mesh`): a copy of the model lies there meanwhile. By default where the
        model lies, which `load` can place on a mesh.

    Returns:
      What comes after the prompt: a text for a text, a list of texts for a list, and of token ids the new ones of every
      prompt, without the stop token.

    Raises:
      HeadshareError: no prompt, an empty prompt, a token outside the vocabulary, or a text without a tokenizer.

    Examples:
      >>> text = hs.generate(model, "Once upon a time", tokenizer="my-llama", max_new_tokens=8)
      >>> prompts = [tokenizer("Once upon a time").input_ids, tokenizer("The sea").input_ids]
      >>> [len(answer) for answer in hs.generate(model, prompts, max_new_tokens=8)]
      [8, 8]
    """
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "sampling": sampling, "stop_tokens": stop_tokens, "seed": seed,
        "mesh": mesh,
    }  # fmt: skip
    texts = [prompts] if isinstance(prompts, str) else [text for text in prompts if isinstance(text, str)]
    if not texts:
        return ids.generate(model, prompts, **settings)  # type: ignore[arg-type]
    if len(texts) < len(prompts) and not isinstance(prompts, str):
        raise HeadshareError("Prompts must be texts or lists of token ids, not some of both.", option="prompts")
    words = tokenizer_of(tokenizer)
    answers = ids.generate(model, [tokenizers.encode(words, text) for text in texts], **settings)
    said = [tokenizers.decode(words, answer) for answer in answers]
    return said[0] if isinstance(prompts, str) else said


@overload
def stream(model: Llama, prompt: str, *, tokenizer: AnyTokenizer | None = None, **settings: Any) -> Iterator[str]: ...
@overload
def stream(
    model: Llama, prompt: Sequence[int], *, tokenizer: AnyTokenizer | None = None, **settings: Any
) -> Iterator[int]: ...
def stream(
    model: Llama, prompt: str | Sequence[int], *, tokenizer: AnyTokenizer | None = None, **settings: Any
) -> Iterator[str] | Iterator[int]:
    """What `generate` gives for one prompt, each part as soon as it and a few tokens more are there.

    Args:
      model: dense or shared.
      prompt: a text, or token ids.
      tokenizer: as for `generate`.
      settings: keyword arguments of `generate`.

    Returns:
      An iterator: for a text of its continuation's pieces, which end between characters; for token ids of tokens.

    Raises:
      HeadshareError: as `generate`, before the iterator is made.

    Examples:
      >>> for piece in hs.stream(model, "Once upon a time", tokenizer=tokenizer, max_new_tokens=8):
      ...     print(piece, end="", flush=True)  # doctest: +SKIP
      >>> prompt = tokenizer("Once upon a time").input_ids
      >>> list(hs.stream(model, prompt)) == hs.generate(model, [prompt])[0]
      True
    """
    if not isinstance(prompt, str):
        return streams.stream(model, prompt, **settings)
    words = tokenizer_of(tokenizer)
    return pieces(words, streams.stream(model, tokenizers.encode(words, prompt), **settings))


def pieces(tokenizer: "PreTrainedTokenizerBase", tokens: Iterable[int]) -> Iterator[str]:
    """The text of some tokens, piece after piece; together they are what the tokenizer makes of all of them."""
    said: list[int] = []
    shown = ""
    for token in tokens:
        said.append(token)
        text = tokenizers.decode(tokenizer, said)
        if len(text) > len(shown) and not text.endswith(_INCOMPLETE):
            yield text[len(shown) :]
            shown = text
    rest = tokenizers.decode(tokenizer, said)[len(shown) :]
    if rest:
        yield rest


def load_sampling(src: str | Path) -> Sampling:
    """How a checkpoint's maker chose to draw its tokens: by `generation_config.json`, or a GGUF file's keys.

    Greedy where they do not ask for draws (`do_sample`); else what they leave open is as in transformers.

    Raises:
      HeadshareError: there is no such checkpoint, or the file has something else where a number should be.

    Examples:
      >>> hs.load_sampling("my-llama")
      Sampling(temperature=0.0, top_k=None, top_p=1.0)
    """
    return chosen(convert.locate(src))[0]


def chosen(path: Path, **given: Any) -> tuple[Sampling, int | None]:
    """How to draw tokens and how many at most: as is given, and where that is None as the checkpoint says."""
    defaults = generation_config.defaults(path)
    names = ("temperature", "top_k", "top_p")
    try:
        sampling = Sampling(*(getattr(defaults, name) for name in names))
    except HeadshareError as error:
        raise HeadshareError(f"{path / generation_config.NAME if path.is_dir() else path}: {error}") from error
    most = given.pop("max_new_tokens", None)
    sampling = replace(sampling, **{name: value for name, value in given.items() if value is not None})
    return sampling, defaults.max_new_tokens if most is None else most
