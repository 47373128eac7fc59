"""`headshare eval`."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro
from rich.console import RenderableType

from headshare_jax import convert
from headshare_jax.cli.command import Command, ComputeDtype, Source, progress
from headshare_jax.convert import text, tokenizer
from headshare_jax.evaluation import perplexity


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Measure perplexity on a text.

    Example: headshare eval smollm2-shared --text wiki.test.txt --seq-len 2048
    """

    src: Source
    text: Annotated[
        str,
        tyro.conf.arg(
            help="Text, JSONL or parquet file, or data set name[:config[:split]]: wikitext:wikitext-2-raw-v1:test."
        ),
    ]
    seq_len: Annotated[int, tyro.conf.arg(help="Tokens in a window.")] = 2048
    stride: Annotated[
        int | None, tyro.conf.arg(help="Tokens from one window's start to the next; the window length by default.")
    ] = None
    max_windows: Annotated[int | None, tyro.conf.arg(help="Run the first windows only.")] = None
    batch_size: Annotated[int, tyro.conf.arg(help="Windows run at a time.")] = 1
    compute_dtype: ComputeDtype = "float32"

    def run(self) -> dict[str, Any]:
        path = convert.locate(self.src)
        content = text.read(self.text)
        tokens = tokenizer.load(path)(content, verbose=False).input_ids
        model = convert.load(path, compute_dtype=self.compute_dtype)
        with progress("perplexity") as step:
            result = perplexity(
                model,
                tokens,
                seq_len=self.seq_len,
                stride=self.stride,
                max_windows=self.max_windows,
                batch_size=self.batch_size,
                words=len(content.split()),
                progress=step,
            )
        return asdict(result) | {"protocol": result.protocol, "text": self.text, "compute_dtype": self.compute_dtype}

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        yield f"token perplexity {result['token_perplexity']:.3f}, word perplexity {result['word_perplexity']:.3f}"
        yield f"protocol: {result['protocol']}; computed in {result['compute_dtype']}"
        if result["seq_len"] < self.seq_len:
            yield f"The text is shorter than --seq-len {self.seq_len}, so it is one window by itself."
