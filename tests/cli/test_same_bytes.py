"""The same command gives the same bytes, at another time and in another folder."""

import time
from pathlib import Path
from typing import Any

import pytest

DIRECT = ("--ratio", 0.3, "--method", "direct", "--no-eval")
COMMANDS = {
    "native": ("share", "MODEL", "out", *DIRECT, "--save-map", "map.json", "--plot", "map.svg"),
    "hf": ("share", "MODEL", "out", *DIRECT, "--to", "hf", "--plot", "map.png"),
    "hf-compact": ("share", "MODEL", "out", *DIRECT, "--to", "hf-compact", "--plot", "map.pdf"),
    "gguf": ("share", "MODEL", "out.gguf", *DIRECT, "--to", "gguf"),
    "scores": ("match", "MODEL", "-o", "scores.npz", "--plot", "scores.png"),
    "sweep": ("sweep", "MODEL", "-o", "out", "--ratios", 0.3, "--methods", "direct", "--text", "TEXT", "--seq-len", 64),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_gives_the_same_bytes(
    name: str, headshare: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, found = time.time, []
    for days in range(2):
        folder = tmp_path / str(days)
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(time, "time", lambda days=days: now() + 86_400 * days)
        headshare(*({"MODEL": model, "TEXT": text}.get(str(word), word) for word in COMMANDS[name]))
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        found.append({str(file.relative_to(folder)): file.read_bytes() for file in files})
    assert found[0]
    assert {file: found[1].get(file) == content for file, content in found[0].items()} == dict.fromkeys(found[1], True)
