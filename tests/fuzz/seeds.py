"""Valid files of a tiny model, each made when it is first asked for, to lie beside damaged ones or to be damaged."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import yaml

import headshare_jax as hs
from headshare_jax import cli

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0.1"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{{ eos_token }}"
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


class Seeds:
    """A folder of valid files, by name."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """The path of a seed, which is made if it was not."""
        path = self.folder / name
        if not path.exists():
            _MAKERS[name](self, path)
        return path

    def read(self, name: str) -> bytes:
        """The content of a file, or of one in a seed that is a folder."""
        self.path(name.partition("/")[0])
        return (self.folder / name).read_bytes()

    def files(self, name: str) -> list[str]:
        """Names of the files in a seed that is a folder, or in one of its folders, with the seed's own name before."""
        self.path(name.partition("/")[0])
        path = self.folder / name
        return sorted(str(file.relative_to(self.folder)) for file in path.rglob("*") if file.is_file())


def _written(name: str) -> Callable[[Seeds, Path], None]:
    def make(seeds: Seeds, path: Path) -> None:
        source = WRITTEN / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, path)

    return make


def _hf(seeds: Seeds, path: Path) -> None:
    shutil.copytree(WRITTEN / "dense-hf", path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT_TEMPLATE}))


def _native(seeds: Seeds, path: Path) -> None:
    hs.save(hs.open_checkpoint(WRITTEN / "shared"), path, tokenizer_from=WRITTEN / "shared")


def _sharded(seeds: Seeds, path: Path) -> None:
    from headshare_jax.convert import huggingface

    path.mkdir()
    huggingface.write(hs.open_checkpoint(WRITTEN / "dense-hf"), path, shard_bytes=20_000)


def _torch(seeds: Seeds, path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.copytree(WRITTEN / "dense-hf", path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def _gguf(seeds: Seeds, path: Path) -> None:
    import tiny_cli_model

    folder = seeds.folder / ".gguf"
    tiny_cli_model.saved_without_torch(folder, hidden_size=32, intermediate_size=32)
    hs.save(hs.open_checkpoint(folder), path, to="gguf", tokenizer_from=folder)
    shutil.rmtree(folder)


def _pruned(seeds: Seeds, path: Path) -> None:
    """Of llama.cpp's architecture whose layers differ; with settings and map as this library writes them."""
    from support import sharing_by_hand, tiny_model

    model = tiny_model(hidden_size=32, intermediate_size=32)
    hs.save(hs.share(model, sharing_by_hand(model, "qkv", {}, (1, 4))), path, to="gguf")


def _text(seeds: Seeds, path: Path) -> None:
    path.write_text(TEXT)


def _jsonl(seeds: Seeds, path: Path) -> None:
    path.write_text("".join(json.dumps({"text": TEXT[:900], "id": row}) + "\n" for row in range(3)))


def _parquet(seeds: Seeds, path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [TEXT, None, "end"], "id": [1, 2, 3]}), path)


def _recipe(seeds: Seeds, path: Path) -> None:
    recipe = yaml.safe_load((WRITTEN / "run" / "config.yaml").read_text())
    recipe |= {"model": "hf", "data": recipe["data"] | {"train": "text.txt", "eval": "text.txt"}}
    path.write_text(yaml.safe_dump(recipe))


def _command(*args: str) -> Callable[[Seeds, Path], None]:
    """Made by a command of ours, in which `OUT` stands for the seed, and other seeds for themselves."""

    def make(seeds: Seeds, path: Path) -> None:
        thrown_away = seeds.folder / ".out"
        places = {"OUT": path, "out": thrown_away}
        words = [str(places.get(arg) or (seeds.path(arg) if arg in _MAKERS else arg)) for arg in args]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            assert cli.run(words) == 0, said.getvalue()
        shutil.rmtree(thrown_away, ignore_errors=True)

    return make


EVAL = ("eval", "hf", "--text", "text.txt", "--seq-len", "16", "--max-windows", "2")
# Every token goes through the tokenizer both ways.
GENERATE = ("generate", "hf", "--prompt", "aé 1", "--max-new-tokens", "2")
_CALIBRATED = ("--calibrate", "text.txt", "--calibrate-tokens", "64", "--seq-len", "16")
SWEEP = (
    "sweep",
    "hf",
    "--text",
    "text.txt",
    "--ratios",
    "0.3",
    "--methods",
    "direct",
    "--seq-len",
    "16",
    "--max-windows",
    "2",
)
WORK = ("share", "hf", "out", "--ratio", "0.3", "--method", "fitted", *_CALIBRATED, "--work", "work")
_MAKERS: dict[str, Callable[[Seeds, Path], None]] = {
    "hf": _hf,
    "native": _native,
    "compact": _written("shared-compact"),
    "shared-hf": _written("shared-hf"),
    "old": _written("shared"),
    "sharded": _sharded,
    "bin": _torch,
    "model.gguf": _gguf,
    "pruned.gguf": _pruned,
    "map.json": _written("maps/unit-ties.json"),
    "budget.json": _written("maps/budget.json"),
    "recipe.yaml": _recipe,
    "text.txt": _text,
    "rows.jsonl": _jsonl,
    "rows.parquet": _parquet,
    "report": _command(*SWEEP, "-o", "OUT"),
    "work": _command(*WORK[:-1], "OUT"),
}
