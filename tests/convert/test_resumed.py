"""A conversion that was killed is gone on with: what it left is verified and kept, and nothing else is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cli_model
from support_killed import SMALL_FILES, converts, started

import headshare_jax as hs
from headshare_jax.convert import atomic
from headshare_jax.convert.tensor_files import TensorCheckpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cli_model.saved(tmp_path_factory.mktemp("model") / "my-llama", num_hidden_layers=6)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of a pool in a file."""
    monkeypatch.setattr("headshare_jax.convert.native_array.SHARD_BYTES", SMALL_FILES)


def killed(model: Path, dst: Path, to: str, parts: int) -> Path:
    """The folder that a conversion left that was killed after so many parts."""
    process = started(converts, model, dst, to, parts)
    process.join(120)
    assert process.exitcode == -9
    (left,) = dst.parent.glob(f".{dst.name}.*.partial")
    return left


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def converted(model: Path, dst: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Converts here; the number of slices that it read."""
    read: list[Any] = []
    original = TensorCheckpoint.values

    def counted(self: TensorCheckpoint, tensor: str, cut: Any = None) -> np.ndarray:
        read.append(tensor)
        return original(self, tensor, cut)

    source = hs.open_checkpoint(model)
    with monkeypatch.context() as patch:
        patch.setattr(TensorCheckpoint, "values", counted)
        hs.save(source, dst, to=to, tokenizer_from=model)
    return len(read)


@pytest.mark.parametrize(("to", "parts"), [("native", 1), ("native", 9), ("hf", 12)])
def test_what_was_written_is_not_read_again(
    to: str, parts: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "whole").mkdir()
    every = converted(model, tmp_path / "whole" / "out", to, monkeypatch)
    killed(model, tmp_path / "out", to, parts)
    again = converted(model, tmp_path / "out", to, monkeypatch)
    assert again <= every - parts
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'out'} is gone on with where a killed process had stopped."
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("to", ["native", "hf"])
def test_what_was_damaged_since_is_written_again(
    to: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    converted(model, tmp_path / "whole" / "out", to, monkeypatch)
    left = killed(model, tmp_path / "out", to, 9)
    for file in left.rglob("*"):
        if file.is_file() and (file.parts[-4:-3] == ("c",) or file.suffix == ".safetensors"):
            values = np.memmap(file, np.uint8, "r+")
            values[len(values) // 9] ^= 1
            values.flush()
    converted(model, tmp_path / "out", to, monkeypatch)
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")


def test_another_conversion_begins_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = killed(model, tmp_path / "out", "native", 9)
    with atomic.new_directory(tmp_path / "other") as folder:
        (folder / "something").touch()
    assert left.exists()
    assert f"{left} is half of out; write that again to go on, or delete it." in caplog.messages
    caplog.clear()
    hs.save(hs.open_checkpoint(model), tmp_path / "out", to="hf")
    assert caplog.messages == [f"{left} is removed, which a killed process had left."]
    assert not left.exists()


def test_threads_raise_what_a_source_raises(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: TensorCheckpoint, name: str, layer: int | None = None, heads: Sequence[int] | None = None) -> Any:
        raise hs.HeadshareError(f"{name} is damaged.")

    source = hs.open_checkpoint(model)
    monkeypatch.setattr(TensorCheckpoint, "read", fails)
    for to in ("native", "hf"):
        with pytest.raises(hs.HeadshareError, match="is damaged"):
            hs.save(source, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []
