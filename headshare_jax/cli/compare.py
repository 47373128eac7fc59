"""`headshare compare`."""

import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import tyro
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from headshare_jax import convert
from headshare_jax.calibration.windows import calibration_windows
from headshare_jax.cli import kinds
from headshare_jax.cli.drawing import Drawing, prompt_tokens, tell_context
from headshare_jax.convert import text as texts
from headshare_jax.convert import tokenizer as tokenizers
from headshare_jax.errors import HeadshareError
from headshare_jax.evaluate.agreement import Agreement, agreement
from headshare_jax.loading import load_tokenizer
from headshare_jax.model.generate import generate
from headshare_jax.model.mesh import local_mesh
from headshare_jax.report.progress import progress
from headshare_jax.resources import megabytes
from headshare_jax.sharing.ledger import ledger
from headshare_jax.signals import handled

_PROMPTS = ("The capital of France is", "Water boils when", "Once upon a time, there was")
_MESSAGES = ("What is the capital of France?", "Why does water boil?", "Tell me a very short story about a fox.")


def _model(metavar: str, help: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help=help)


@dataclass(frozen=True, kw_only=True)
class Compare(Drawing):
    """Show two models' answers side by side, and with --text how well they predict it and how far they agree.

    Example: headshare compare SmolLM2-135M.gguf smollm2-shared "The capital of France is" --text held-out.txt

    Attributes:
      chat: Treat each prompt as a message to a chat model.
      text: Text that no method was fitted to: a file, or data set name[:config[:split]], as for eval.
      seq_len: Tokens in a window of the text.
      windows: Windows of the text, from its start.
    """

    needs: ClassVar = {"seq_len": ("text",), "windows": ("text",)}

    first: Annotated[tyro.conf.Positional[str], _model("A", "Model to compare with, such as the dense one.")]
    second: Annotated[tyro.conf.Positional[str], _model("B", "The other model.")]
    prompts: Annotated[
        tyro.conf.Positional[tuple[kinds.Words, ...]],
        _model("[PROMPT ...]", "Prompts; three short ones by default."),
    ] = ()
    chat: bool = False
    text: kinds.TextName | None = None
    seq_len: kinds.WindowLength = 512
    windows: kinds.Count = 16

    def run(self) -> dict[str, Any]:
        names, given = (self.first, self.second), self.prompts or (_MESSAGES if self.chat else _PROMPTS)
        paths = [convert.locate(name) for name in names]
        sources = [convert.open_checkpoint(path) for path in paths]
        words = [load_tokenizer(path) for path in paths]
        prompts = [
            [prompt_tokens(name, tokenizer, text, chat=self.chat) for text in given]
            for name, tokenizer in zip(names, words, strict=True)
        ]
        windows_wt = None if self.text is None else self._windows(words, sources[0].config.vocab_size)
        answers = [
            self._answers(name, path, tokenizer, tokens)
            for name, path, tokenizer, tokens in zip(names, paths, words, prompts, strict=True)
        ]
        sizes = [ledger(source, path=source.path) for source in sources]
        return {
            "models": [
                {"name": name, "parameters": size.stored, "disk_bytes": size.disk_bytes}
                for name, size in zip(names, sizes, strict=True)
            ],
            "answers": [
                {"prompt": prompt, "answers": [each[row] for each in answers]} for row, prompt in enumerate(given)
            ],
            "agreement": None if windows_wt is None else asdict(self._agreement(sources, windows_wt)),
        }

    def _windows(self, words: list[Any], vocab_size: int) -> np.ndarray:
        assert self.text is not None
        content = texts.read(self.text)
        first, second = (tokenizers.encode(tokenizer, content) for tokenizer in words)
        if first != second:
            raise HeadshareError(
                "The tokenizers of the two models cut the text into different tokens, of which perplexities cannot be "
                "compared; leave --text out, and see eval for each model's perplexity by words."
            )
        seq_len = min(self.seq_len, len(first))
        return calibration_windows(first, min(self.windows, len(first) // seq_len), seq_len, vocab_size)

    def _answers(self, name: str, path: Path, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
        sampling, most = self.drawn(path, usual=64)
        model = self.loaded(name, path)
        tell_context(max(map(len, prompts)) + most, model)
        # Handlers would wait for the compiled loop; nothing is being written meanwhile.
        with handled(signal.SIG_DFL):
            found = generate(model, prompts, max_new_tokens=most, sampling=sampling, seed=self.seed)
        return [tokenizers.decode(tokenizer, answer) for answer in found]

    def _agreement(self, sources: list[convert.Checkpoint], windows_wt: np.ndarray) -> Agreement:
        with progress("comparing") as step:
            first, second = sources
            return agreement(first, second, windows_wt, mesh=local_mesh(self.mesh), progress=step)

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        models, found = result["models"], result["agreement"]
        table = Table("", *(model["name"] for model in models), show_lines=True)
        table.add_row("parameters", *(f"{model['parameters']:,}" for model in models))
        table.add_row("on disk", *(megabytes(model["disk_bytes"]) for model in models))
        for entry in result["answers"]:
            table.add_row(Text(entry["prompt"], "bold"), *(Text(answer.strip()) for answer in entry["answers"]))
        if found is not None:
            table.add_row("perplexity", *(f"{found[name]:.2f}" for name in ("before", "after")))
        yield table
        if found is not None:
            yield f"{Agreement(**found)}; on {found['windows']} windows of {found['seq_len']} tokens of {self.text}"
