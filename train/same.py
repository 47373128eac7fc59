"""What must be the same in all processes of a run, by names to say it by."""

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import headshare_jax
from headshare_jax import convert
from headshare_jax import train as own_train
from headshare_jax.convert import storage
from headshare_jax.train import recipe as recipes
from headshare_jax.train.inputs import Run

# Of a file of weights this much is looked at, in the beginning, the middle and the end: all would take hours.
_PIECE = 1 << 16


def beginning(recipe: recipes.Recipe, resume: bool) -> dict[str, object]:
    """Known before anything is read: versions, and every value of the recipe."""
    packages = (headshare_jax, convert, own_train)
    sources = (file for package in packages for file in sorted(Path(package.__path__[0]).rglob("*.py")))
    return {
        **{f"the version of {name}": version(name) for name in ("headshare-jax", "jax", "jaxlib")},
        "the code of headshare-jax": _short(file.read_bytes() for file in sources),
        "resume": resume,
        **recipes.flat(recipe),
    }


def inputs(task: Run) -> dict[str, object]:
    """Known when all is prepared: model, map and texts."""
    return {
        "the model's files": _short(_looked_at(task.source.path)),
        "the map": _short([task.sharing.to_json().encode()]),
        "the text": _short([task.blocks.digest.encode()]),
        "the held-out text": _short([task.eval_tokens.tobytes()]),
    }


def _looked_at(path: Path) -> Iterator[bytes]:
    """Names, sizes and pieces of a model's files."""
    if path.is_dir():
        files = {path / name: size for name, size in storage.files(path).items()}
    else:
        files = {path: storage.size(path)}
    for file, size in files.items():
        yield f"{file.name} {size}".encode()
        for place in sorted({0, size // 2, max(0, size - _PIECE)}):
            yield storage.read_range(file, place, min(place + _PIECE, size))


def _short(parts: Iterator[bytes] | list[bytes]) -> str:
    """A digest to compare and to show."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]
