"""A conversion that was killed is gone on with: what it left is verified and kept, and nothing else is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import buckets
import numpy as np
import pytest
import tiny_cli_model
from support_killed import SMALL_FILES, converts, started

import headshare_jax as hs
from headshare_jax.convert import atomic, check_output, storage
from headshare_jax.convert.tensor_files import TensorCheckpoint

ENDINGS = {"gguf": ".gguf"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cli_model.saved(tmp_path_factory.mktemp("model") / "my-llama", num_hidden_layers=6)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of a pool in a file, a few tensors in a piece."""
    monkeypatch.setattr("headshare_jax.convert.native_array.SHARD_BYTES", SMALL_FILES)
    monkeypatch.setattr("headshare_jax.convert.pieces.PIECE_BYTES", SMALL_FILES)
    monkeypatch.setattr("headshare_jax.sharing.source.TABLE_BYTES", SMALL_FILES)


@pytest.fixture
def variables(bucket: str, servers: dict[str, buckets.Server], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """How another process finds a bucket, which joins small pieces."""
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", SMALL_FILES)
    return servers[bucket.partition(":")[0]].variables


def kill(model: Path, dst: Path, to: str, at: int | str, variables: dict[str, str] | None = None) -> None:
    """Converts in a process that is killed after so many parts, or when it has called a function of `storage`."""
    process = started(converts, model, str(dst), to, at, variables or {})
    process.join(120)
    assert process.exitcode == -9


def left_of(dst: Path) -> Path:
    """What a killed process left of an output on this machine."""
    (left,) = dst.parent.glob(f".{dst.name}.*.partial")
    return left


def content(place: Path) -> dict[str, bytes]:
    names = [""] if place.is_file() else storage.files(place)
    return {name: (place / name if name else place).read_bytes() for name in names}


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


@pytest.mark.parametrize(("to", "parts"), [("native", 1), ("native", 9), ("hf", 12), ("gguf", 1), ("gguf", 30)])
def test_what_was_written_is_not_read_again(
    to: str, parts: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / f"out{ENDINGS.get(to, '')}"
    (tmp_path / "whole").mkdir()
    every = converted(model, tmp_path / "whole" / out.name, to, monkeypatch)
    kill(model, out, to, parts)
    assert left_of(out).is_dir()
    again = converted(model, out, to, monkeypatch)
    assert again <= every - parts
    assert content(out) == content(tmp_path / "whole" / out.name)
    assert [record.message for record in caplog.records] == [
        f"{out} is gone on with where a killed process had stopped."
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "whole"]


@pytest.mark.parametrize("to", ["native", "hf", "gguf"])
def test_what_was_damaged_since_is_written_again(
    to: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"out{ENDINGS.get(to, '')}"
    (tmp_path / "whole").mkdir()
    converted(model, tmp_path / "whole" / out.name, to, monkeypatch)
    kill(model, out, to, 9)
    for file in left_of(out).rglob("*"):
        if file.is_file() and (file.parts[-4:-3] == ("c",) or file.suffix in (".safetensors", ".gguf")):
            values = np.memmap(file, np.uint8, "r+")
            values[len(values) // 9] ^= 1
            values.flush()
    converted(model, out, to, monkeypatch)
    assert content(out) == content(tmp_path / "whole" / out.name)


def test_another_conversion_begins_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kill(model, tmp_path / "out", "native", 9)
    left = left_of(tmp_path / "out")
    with atomic.new_directory(tmp_path / "other") as folder:
        (folder / "something").touch()
    assert left.exists()
    assert f"{left} is half of out; write that again to go on, or delete it." in caplog.messages
    caplog.clear()
    hs.save(hs.open_checkpoint(model), tmp_path / "out", to="hf")
    assert caplog.messages == [f"{left} is removed, which a killed process had left."]
    assert not left.exists()


def test_a_file_of_another_type_begins_anew(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out.gguf"
    kill(model, out, "gguf", 9)
    left = left_of(out)
    hs.save(hs.open_checkpoint(model), out, to="gguf", quantize="q8_0", tokenizer_from=model)
    assert caplog.messages == [f"{left} is removed, which a killed process had left."]
    assert list(tmp_path.iterdir()) == [out]
    assert hs.open_checkpoint(out).config.num_layers == 6


@pytest.mark.slow
@pytest.mark.parametrize(("to", "at"), [
    ("native", 1), ("native", 9), ("hf", 1), ("hf", 5), ("hf", "join"), ("gguf", 5), ("gguf", "join"),
])  # fmt: skip
def test_a_bucket_keeps_what_was_written(
    to: str, at: int | str, bucket: str, variables: dict[str, str], model: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    there, name = storage.path(bucket), f"out{ENDINGS.get(to, '')}"
    every = converted(model, there / "whole" / name, to, monkeypatch)
    kill(model, there / name, to, at, variables)
    check_output(there / name, to)
    again = converted(model, there / name, to, monkeypatch)
    assert again <= (every - at if isinstance(at, int) else 0)
    assert content(there / name) == content(there / "whole" / name)
    assert f"{there / name} is gone on with where a killed process had stopped." in caplog.messages
    assert not [name for name in storage.files(there) if "/." in f"/{name}"]


@pytest.mark.slow
def test_what_was_damaged_since_in_a_bucket_is_written_again(
    bucket: str, variables: dict[str, str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = storage.path(bucket)
    converted(model, there / "whole" / "out", "hf", monkeypatch)
    kill(model, there / "out", "hf", 5, variables)
    damaged = there / "out" / next(name for name in storage.files(there / "out") if ".pieces/" in name)
    damaged.write_bytes(bytes(storage.size(damaged)))
    converted(model, there / "out", "hf", monkeypatch)
    assert content(there / "out") == content(there / "whole" / "out")


@pytest.mark.slow
def test_another_conversion_into_a_bucket_begins_anew(
    bucket: str, variables: dict[str, str], model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = storage.path(bucket)
    kill(model, there / "out", "hf", 5, variables)
    with pytest.raises(hs.HeadshareError, match="holds no checkpoint"):
        hs.open_checkpoint(there / "out")
    hs.save(hs.open_checkpoint(model), there / "out")
    assert f"{there / 'out'} is removed, which a killed process had left unfinished." in caplog.messages
    assert hs.open_checkpoint(there / "out").config.num_layers == 6
    assert not [name for name in storage.files(there / "out") if "safetensors" in name or name.startswith(".")]


@pytest.mark.slow
def test_a_whole_file_is_put_in_place_though_its_process_was_killed(
    bucket: str, variables: dict[str, str], model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = storage.path(bucket)
    kill(model, there / "out.gguf", "gguf", "copy", variables)
    assert hs.open_checkpoint(there / "out.gguf").config.num_layers == 6
    assert f"{there / 'out.gguf'} is whole: a process was killed as it put it in place." in caplog.messages
    assert list(storage.files(there)) == ["out.gguf"]


def test_threads_raise_what_a_source_raises(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: TensorCheckpoint, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> Any:
        raise hs.HeadshareError(f"{name} is damaged.")

    source = hs.open_checkpoint(model)
    monkeypatch.setattr(TensorCheckpoint, "read", fails)
    for to in ("native", "hf", "gguf"):
        with pytest.raises(hs.HeadshareError, match="is damaged"):
            hs.save(source, tmp_path / f"out{ENDINGS.get(to, '')}", to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["native", "hf", "gguf"])
def test_an_error_leaves_nothing_in_a_bucket(
    to: str, bucket: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, parts = TensorCheckpoint.values, []

    def fails(self: TensorCheckpoint, tensor: str, cut: Any = None) -> np.ndarray:
        parts.append(tensor)
        if len(parts) == 20:
            raise KeyboardInterrupt
        return read(self, tensor, cut)

    source, there = hs.open_checkpoint(model), storage.path(bucket)
    monkeypatch.setattr(TensorCheckpoint, "values", fails)
    with pytest.raises(KeyboardInterrupt):
        hs.save(source, there / f"out{ENDINGS.get(to, '')}", to=to)
    assert list(storage.files(there)) == []
