"""Converting a checkpoint, against two of its layers in memory and against plain copies of its files in time.

Run from the repository root: python bench/convert.py [SRC]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from common import RESULTS, machine, report, seconds
from rich.table import Table

# Peak memory allowed beside two layers: Python, its libraries, and a parameter that has no layers.
ALLOWANCE = 10**9

CHILD = """
import sys, time
start = time.perf_counter()
from headshare_jax import convert, parameters
imported = time.perf_counter()
import json, math
from common import peak_rss
libraries = peak_rss()
src, dst, to = sys.argv[1:]
begun = time.perf_counter()
source = convert.open_checkpoint(src)
convert.save(source, dst, to=to, tokenizer_from=convert.locate(src))
print(json.dumps({
    "seconds": time.perf_counter() - begun,
    "import_seconds": imported - start,
    "libraries_rss": libraries,
    "peak_rss": peak_rss(),
    "layer_bytes": sum(
        math.prod(parameters.slice_shape(source.config, name)) * source.dtype(name).itemsize
        for name in parameters.layered_names(source.config)
    ),
}))
"""
FIND_DEFAULT = "from headshare_jax.cli.demo import smollm2; print(smollm2())"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a checkpoint to the native format, that to Hugging Face, and that to native again."""

    src: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="SRC")] = None
    """A .gguf file or a Hugging Face folder; SmolLM2-135M-Instruct by default, fetched as `headshare demo` does."""
    repeats: int = 3
    """The best time of so many is taken, after one with the input dropped from the page cache."""
    quick: bool = False
    """Every direction once and cold, to test this benchmark."""
    json: Path | None = None
    """Where to write the result; bench/results/convert.json by default."""


def run(options: Options) -> dict[str, Any]:
    where = machine("jax", "numpy", "orbax-checkpoint", "safetensors")
    src = options.src or Path(output_of("-c", FIND_DEFAULT).strip())
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RESULTS) as folder:
        native, hf, again = (Path(folder) / name for name in ("native", "hf", "again"))
        directions = [
            ("GGUF -> native" if src.is_file() else "HF -> native", src, native),
            ("native -> HF", native, hf),
            ("HF -> native", hf, again),
        ]
        repeats = 0 if options.quick else options.repeats
        rows = [{"name": name} | measured(one, other, repeats) for name, one, other in directions]
    return {"machine": where, "source": src.name, "repeats": repeats, "directions": rows}


def measured(src: Path, dst: Path, repeats: int) -> dict[str, Any]:
    """Converts once cold and then `repeats` times warm, and copies the files of both sides likewise."""
    drop_from_page_cache(src)
    runs = [converted(src, dst) for _ in range(1 + repeats)]
    drop_from_page_cache(src)
    copies = [copied(src, dst.parent) for _ in range(1 + repeats)]
    warm = slice(min(1, repeats), None)
    seconds = {
        "convert_cold": runs[0]["seconds"],
        "convert": min(run["seconds"] for run in runs[warm]),
        "import": min(run["import_seconds"] for run in runs),
        "copy_input_cold": copies[0],
        "copy_input": min(copies[warm]),
        "copy_output": min(copied(dst, dst.parent) for _ in range(1 + repeats)),
    }
    peak, limit = max(run["peak_rss"] for run in runs), 2 * runs[0]["layer_bytes"] + ALLOWANCE
    return {
        "seconds": seconds,
        "ratio": {
            "to_copy_of_input": seconds["convert"] / seconds["copy_input"],
            "to_copy_of_output": seconds["convert"] / seconds["copy_output"],
            "to_copy_of_input_cold": seconds["convert_cold"] / seconds["copy_input_cold"],
        },
        "bytes": {
            "input": sum(file.stat().st_size for file in files(src)),
            "output": sum(file.stat().st_size for file in files(dst)),
            "layer": runs[0]["layer_bytes"],
            "libraries_rss": runs[0]["libraries_rss"],
            "peak_rss": peak,
            "limit": limit,
        },
        "files": len(files(dst)),
        "peak_of_limit": peak / limit,
    }


def converted(src: Path, dst: Path) -> dict[str, float]:
    """One conversion in a process of its own."""
    shutil.rmtree(dst, ignore_errors=True)
    os.sync()
    to = "hf" if dst.name == "hf" else "native"
    result: dict[str, float] = json.loads(output_of("-c", CHILD, str(src.absolute()), str(dst.absolute()), to))
    return result


def output_of(*arguments: str) -> str:
    """What Python prints, run in this folder, where `common` lies."""
    command, folder = [sys.executable, *arguments], Path(__file__).parent
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder).stdout


def copied(path: Path, folder: Path) -> float:
    """Seconds of copying all files of a checkpoint, one after another."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        os.sync()
        return seconds(lambda: [shutil.copyfile(file, f"{place}/{number}") for number, file in enumerate(files(path))])


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def drop_from_page_cache(path: Path) -> None:
    """Makes the next reads of a checkpoint come from the disk (as far as the system has it in its own hands)."""
    for file in files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tables(result: dict[str, Any]) -> list[Table]:
    time = Table("seconds", "convert", "copy input", "copy output", "convert cold", "copy input cold", title="time")
    memory = Table("MB", "input", "output", "files", "a layer", "peak RSS", "limit", "of the limit", title="memory")
    for row in result["directions"]:
        took, ratio, sizes = row["seconds"], row["ratio"], row["bytes"]
        time.add_row(
            row["name"],
            f"{took['convert']:.2f}",
            f"{took['copy_input']:.2f} ({ratio['to_copy_of_input']:.1f}x)",
            f"{took['copy_output']:.2f} ({ratio['to_copy_of_output']:.1f}x)",
            f"{took['convert_cold']:.2f}",
            f"{took['copy_input_cold']:.2f} ({ratio['to_copy_of_input_cold']:.1f}x)",
        )
        ends, peaks = (
            [f"{sizes[name] / 1e6:,.0f}" for name in names]
            for names in (("input", "output"), ("layer", "peak_rss", "limit"))
        )
        memory.add_row(row["name"], *ends, str(row["files"]), *peaks, f"{row['peak_of_limit']:.0%}")
    return [time, memory]


def notes(result: dict[str, Any]) -> list[str]:
    imports = min(row["seconds"]["import"] for row in result["directions"])
    libraries = max(row["bytes"]["libraries_rss"] for row in result["directions"])
    return [
        f"{result['source']}; best of {result['repeats']} runs with the input in the page cache; "
        f"cold is one run that reads it from the disk; imports, not counted, take {imports:.1f} s",
        f"the limit is two layers and {ALLOWANCE / 1e6:,.0f} MB for everything else, "
        f"{libraries / 1e6:,.0f} MB of it taken by Python and libraries",
    ]


if __name__ == "__main__":
    options = tyro.cli(Options)
    result = run(options)
    report("convert", result, tables(result), notes(result), options.json)
