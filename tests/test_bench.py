"""The benchmarks run, and write what they print."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny_cli_model

BENCH = Path(__file__).parents[1] / "bench"


def measured(name: str, tmp_path: Path, *args: str) -> Any:
    """What a benchmark writes when it is only tried out."""
    result = tmp_path / "result.json"
    command = [sys.executable, str(BENCH / f"{name}.py"), *args, "--quick", "--json", str(result)]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(result.read_text())


def test_match(tmp_path: Path) -> None:
    result = measured("match", tmp_path)
    assert result["largest_difference"] < 1e-5
    assert result["seconds"]["match"] > result["seconds"]["scores"] / 2 > 0
    assert result["pairs"] > 0


def test_convert(tmp_path: Path) -> None:
    result = measured("convert", tmp_path, str(tiny_cli_model.saved(tmp_path / "model")))
    assert [row["name"] for row in result["directions"]] == ["HF -> native", "native -> HF", "HF -> native"]
    for row in result["directions"]:
        assert row["bytes"]["peak_rss"] > row["bytes"]["libraries_rss"] > 0
        assert row["bytes"]["output"] >= row["bytes"]["model"] > 0
        assert row["seconds"]["convert"] > 0
