"""`headshare eval`."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from headshare_jax import convert
from headshare_jax.calibration.overlap import Overlap, TextRuns
from headshare_jax.cli import kinds
from headshare_jax.cli.command import Command, ComputeDtype, MeshSizes, Source
from headshare_jax.convert import storage, text
from headshare_jax.convert.tokenizer import encode
from headshare_jax.errors import HeadshareError
from headshare_jax.evaluate.perplexity import perplexity
from headshare_jax.loading import load, load_tokenizer
from headshare_jax.model.mesh import local_mesh
from headshare_jax.report.progress import progress


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Measure perplexity on a text, and the tasks of EleutherAI's evaluation harness.

    Example: headshare eval smollm2-shared --text wiki.test.txt --seq-len 2048

    Attributes:
      text: Text, JSONL or parquet file, or data set name[:config[:split]]: wikitext:wikitext-2-raw-v1:test.
      text_field: Field or column of --text that holds the text.
      seq_len: Tokens in a window.
      stride: Tokens from one window's start to the next; the window length by default.
      max_windows: Run the first windows only.
      tasks: Tasks of the harness, separated by commas: hellaswag,piqa (needs lm-eval).
      task_folder: Folder of task files (YAML) to take the tasks from instead of the harness's.
      task_limit: Run the first examples of each task only.
      batch_size: Windows or examples run at a time.
    """

    needs: ClassVar = dict.fromkeys(("text_field", "seq_len", "stride", "max_windows"), ("text",)) | dict.fromkeys(
        ("task_folder", "task_limit"), ("tasks",)
    )

    src: Source
    text: kinds.TextName | None = None
    text_field: str = "text"
    seq_len: kinds.WindowLength = 2048
    stride: kinds.Count | None = None
    max_windows: kinds.Count | None = None
    tasks: str | None = None
    task_folder: Path | None = None
    task_limit: kinds.Count | None = None
    batch_size: kinds.Count = 1
    compute_dtype: ComputeDtype = "float32"
    mesh: MeshSizes = None

    def run(self) -> dict[str, Any]:
        if self.text is None and self.tasks is None:
            raise HeadshareError("Give --text, to measure perplexity, or --tasks, or both.")
        if self.task_folder is not None and (storage.in_bucket(self.task_folder) or not self.task_folder.is_dir()):
            raise HeadshareError(
                f"There is no folder {self.task_folder} on this machine; --task-folder takes one with task files."
            )
        if self.text is not None and not text.has_fields(self.text):
            self.refuse("text_field", without="rows in --text, as of JSONL and parquet files and data sets")
        mesh = local_mesh(self.mesh)
        harness: Any = None if self.tasks is None else _harness()
        path = convert.locate(self.src)
        content = None if self.text is None else text.read(self.text, field=self.text_field)
        tokenizer = load_tokenizer(path)
        source = convert.open_checkpoint(path)
        model = load(source, compute_dtype=self.compute_dtype, mesh=mesh)
        result: dict[str, Any] = {"compute_dtype": self.compute_dtype}
        if content is not None:
            tokens = np.asarray(encode(tokenizer, content), np.int32)
            with progress("perplexity") as step:
                found = perplexity(
                    model,
                    tokens,
                    seq_len=self.seq_len,
                    stride=self.stride,
                    max_windows=self.max_windows,
                    batch_size=self.batch_size,
                    words=len(content.split()),
                    progress=step,
                )
            result |= asdict(found) | {"protocol": found.protocol, "text": self.text}
            calibration = TextRuns.in_provenance(getattr(source, "provenance", {}))
            if calibration is not None:
                covered = (found.windows - 1) * found.stride + found.seq_len
                result["overlap"] = asdict(calibration.overlap(tokens[:covered], found.seq_len))
        if self.tasks is not None:
            with progress("tasks") as step:
                result["tasks"] = harness.run_tasks(
                    model,
                    tokenizer,
                    [name.strip() for name in self.tasks.split(",")],
                    folder=self.task_folder,
                    limit=self.task_limit,
                    batch_size=self.batch_size,
                    progress=step,
                )
        return result

    def show(self, result: dict[str, Any]) -> Iterator[RenderableType]:
        if self.text is not None:
            yield f"token perplexity {result['token_perplexity']:.3f}, word perplexity {result['word_perplexity']:.3f}"
            yield f"protocol: {result['protocol']}; computed in {result['compute_dtype']}"
            if "overlap" in result:
                yield Overlap(**result["overlap"]).sentence()
            if result["seq_len"] < self.seq_len:
                yield f"The text is shorter than --seq-len {self.seq_len}, so it is one window by itself."
        if self.tasks is not None:
            table = Table("task", "metric", "value")
            for task, metrics in result["tasks"].items():
                for metric, value in metrics.items():
                    table.add_row(task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
            yield table


def _harness() -> Any:
    try:
        from headshare_jax.evaluate import harness
    except ImportError as error:
        raise HeadshareError("--tasks needs one more package: pip install 'headshare-jax[eval]'.") from error
    return harness
