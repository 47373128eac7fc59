"""What importing the package needs."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny_cli_model
from support import saved_hf_model, tiny_hf_model

import headshare_jax

ROOT = Path(__file__).parents[1]
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


def test_importing_loads_neither_torch_nor_kernels() -> None:
    loaded = (
        "[name for name in sys.modules if name == 'torch' or 'jax.experimental.pallas' in name or '.kernels.' in name]"
    )
    command = [sys.executable, "-c", f"import sys, headshare_jax; print({loaded})"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert finished.stdout == "[]\n"


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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages as `pip install .` lays them out: those that pyproject.toml lists, and no others."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    site_packages = tmp_path_factory.mktemp("site-packages")
    for package in settings["packages"]:
        folders = {name: path for name, path in settings["package-dir"].items() if f"{package}.".startswith(f"{name}.")}
        nearest = max(folders, key=len)
        source = ROOT.joinpath(folders[nearest], *package.removeprefix(nearest).split("."))
        target = site_packages.joinpath(*package.split("."))
        target.mkdir()
        for file in filter(Path.is_file, source.iterdir()):
            shutil.copy(file, target)
    return site_packages


@pytest.mark.parametrize("in_clone", [True, False])
def test_a_clone_imports_its_own_packages_whatever_is_installed(
    installed: Path, tmp_path: Path, in_clone: bool
) -> None:
    """Python that starts in a clone finds the folder headshare_jax there first, which lacks two packages."""
    code = """
import headshare_jax.cli, headshare_jax.convert.native, headshare_jax.train.losses
for package in headshare_jax, headshare_jax.convert, headshare_jax.train:
    print(package.__path__[0])
"""
    others = [path for path in sys.path if path.endswith("-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), *others])}
    # Without what tells Python of an editable installation.
    finished = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, timeout=120, env=environment,
        cwd=ROOT if in_clone else tmp_path,
    )  # fmt: skip
    package = installed / "headshare_jax"
    beside = [ROOT / "headshare_jax", ROOT / "convert", ROOT / "train"]
    inside = [package, package / "convert", package / "train"]
    assert list(map(Path, finished.stdout.split())) == (beside if in_clone else inside)


def test_old_names_still_work_and_say_what_they_are_now() -> None:
    with pytest.warns(DeprecationWarning, match="FunctionalSettings"):
        assert headshare_jax.Search is headshare_jax.FunctionalSettings
