"""What importing the package needs."""

import subprocess
import sys
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


def test_a_clone_imports_its_own_packages_whatever_is_installed(tmp_path: Path) -> None:
    """Python that starts in a clone finds the folder headshare_jax there first, which lacks two packages."""
    code = "import headshare_jax.convert, headshare_jax.train.losses; print(headshare_jax.convert.__file__)"
    isolated = [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path[1:]!r}; sys.meta_path[3:] = []; {code}"]
    finished = subprocess.run(isolated, capture_output=True, text=True, check=True, timeout=120, cwd=ROOT)
    assert Path(finished.stdout.strip()) == ROOT / "convert" / "__init__.py"


def test_no_kernel_is_imported_before_it_runs() -> None:
    code = "import sys, headshare_jax; print([name for name in sys.modules if 'jax.experimental.pallas' in name or '.kernels.' in name])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert finished.stdout == "[]\n"


def test_old_names_still_work_and_say_what_they_are_now() -> None:
    with pytest.warns(DeprecationWarning, match="FunctionalSettings"):
        assert headshare_jax.Search is headshare_jax.FunctionalSettings
