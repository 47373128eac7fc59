"""What importing the package needs, and which packages may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_cli_model
from support import saved_hf_model, tiny_hf_model

import headshare_jax
from headshare_jax import convert

CORE, CONVERT = Path(headshare_jax.__file__).parent, Path(convert.__file__).parent
TRAIN = CORE.parent / "train"
LAYERS = {"core": 0, "convert": 1, "train": 2, "cli": 3}
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import headshare_jax
model = headshare_jax.load(sys.argv[1])
print(headshare_jax.ledger(model).stored, [name for name in sys.modules if name.startswith("torch.")])
"""


def test_safetensors_are_loaded_without_torch(tmp_path: Path) -> None:
    stored = sum(parameter.numel() for parameter in tiny_hf_model().parameters())
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(saved_hf_model(tmp_path))]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert finished.stderr == ""
    assert finished.stdout.split() == [str(stored), "[]"]


def test_importing_loads_no_torch() -> None:
    command = [sys.executable, "-c", "import sys, headshare_jax; print('torch' in sys.modules)"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert finished.stdout == "False\n"


def test_generating_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys; from headshare_jax import cli; cli.run(sys.argv[1:]); print('torch' in sys.modules)"
    arguments = ["generate", str(tiny_cli_model.saved(tmp_path)), "--prompt", "a", "--max-new-tokens", "1"]
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert finished.stdout.endswith("False\n")


def test_every_exported_name_exists() -> None:
    assert headshare_jax.__all__ == sorted(headshare_jax.__all__)
    for name in headshare_jax.__all__:
        assert getattr(headshare_jax, name) is not None


def imports(path: Path) -> set[str]:
    """Every module that a file imports, and every name it imports from one, in full."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> int:
    """The layer of a module of this package; anything else is below all layers."""
    parts = module.split(".")
    if parts[0] != "headshare_jax" or len(parts) == 1:
        return -1
    return LAYERS.get(parts[1], LAYERS["core"])


@pytest.mark.parametrize(
    ("layer", "files"),
    [
        ("core", [file for file in CORE.glob("*.py") if file.name not in ("__init__.py", "__main__.py")]),
        ("convert", list(CONVERT.glob("*.py"))),
        ("train", list(TRAIN.glob("*.py"))),
    ],
    ids=["core", "convert", "train"],
)
def test_imports_go_one_way(layer: str, files: list[Path]) -> None:
    assert files
    for file in files:
        upward = {module for module in imports(file) if layer_of(module) > LAYERS[layer]}
        assert not upward, f"{file} imports {', '.join(sorted(upward))}"
