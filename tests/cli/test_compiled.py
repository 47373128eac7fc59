"""What was compiled once is not compiled again by the next command."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_restart_compiles_nothing(model: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS"))}
    environment |= {"HEADSHARE_CACHE": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "headshare_jax",
        "generate",
        str(model),
        "--prompt",
        "One",
        "--max-new-tokens",
        "2",
    ]
    kept = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        kept.append({path.name for path in (tmp_path / "compiled").glob("*/*")})
        assert "compil" not in done.stderr.lower()
    assert kept[0]
    assert kept[0] == kept[1]
