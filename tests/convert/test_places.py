"""Where GGUF and safetensors files say that their tensors lie: whatever overlaps, leaves gaps or ends elsewhere is
refused, and the tensor is named."""

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from headshare_jax import HeadshareError
from headshare_jax.convert.gguf_header import read_header
from headshare_jax.convert.safetensors_files import SafetensorsReader

F32, Q8_0 = int(gguf.GGMLQuantizationType.F32), int(gguf.GGMLQuantizationType.Q8_0)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_file(path: Path, *tensors: tuple[Any, ...], size: int, alignment: int | None = None) -> Path:
    """A file with tensors of (name, values, offset) or (name, values, offset, type), and data of so many bytes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), alignment is not None)
    if alignment is not None:
        head += text("general.alignment") + struct.pack("<II", 4, alignment)
    for name, values, offset, *kind in tensors:
        head += text(name) + struct.pack("<IQIQ", 1, values, kind[0] if kind else F32, offset)
    step = alignment or 32
    path.write_bytes(head + bytes(-len(head) % (step if step > 0 else 1)) + bytes(size))
    return path


SOUND = [
    ([("a", 8, 0), ("b", 8, 32)], 64, None),
    # With the space that the alignment asks for, after the last tensor or not.
    ([("a", 1, 0), ("b", 9, 32), ("c", 1, 96)], 100, None),
    ([("a", 1, 0), ("b", 9, 32), ("c", 1, 96)], 128, None),
    # In another order than the list's.
    ([("b", 8, 32), ("a", 8, 0)], 64, None),
    ([("a", 1, 0), ("b", 1, 64)], 68, 64),
    ([("a", 32, 0, Q8_0), ("b", 8, 64)], 96, None),
    ([("a", 0, 0), ("b", 8, 0)], 32, None),
]


@pytest.mark.parametrize(("tensors", "size", "alignment"), SOUND)
def test_a_gguf_file_without_gaps_is_read(tmp_path: Path, tensors: Any, size: int, alignment: int | None) -> None:
    header = read_header(gguf_file(tmp_path / "a.gguf", *tensors, size=size, alignment=alignment))
    assert list(header.tensors) == [name for name, *_ in tensors]


@pytest.mark.parametrize(
    ("tensors", "size", "alignment", "reason"),
    [
        ([("a", 16, 0), ("b", 8, 32)], 64, None, "b overlaps a"),
        ([("a", 8, 0), ("b", 8, 0)], 32, None, "b overlaps a"),
        ([("a", 8, 0), ("b", 24, 0)], 96, None, "b overlaps a"),
        ([("a", 8, 0), ("b", 8, 36)], 68, None, r"b begins at byte \d+, no multiple of the alignment 32"),
        ([("a", 8, 0), ("b", 8, 64)], 96, None, "between a and b lie 32 bytes that are no tensor's"),
        ([("a", 8, 32)], 64, None, "between the header and a lie 32 bytes"),
        ([("a", 8, 0), ("b", 9, 32)], 64, None, "b reaches beyond its end"),
        ([("a", 8, 2**40)], 64, None, "a reaches beyond its end"),
        ([("a", 8, 2**63)], 64, None, "a reaches beyond its end"),
        ([("a", 2**62, 0)], 64, None, "a reaches beyond its end"),
        ([("a", 8, 0)], 64, None, "after a, its last tensor, 32 bytes are left over"),
        ([("a", 8, 0), ("a", 8, 32)], 64, None, "the tensor a stands twice"),
        ([("a", 31, 0, Q8_0)], 64, None, "rows of a are not a whole number of Q8_0 blocks"),
        ([("a", 8, 0), ("b", 8, 32)], 64, 0, "its alignment is 0"),
        ([("a", 8, 0), ("b", 8, 32)], 64, 48, "its alignment is 48, no power of two"),
        ([("a", 8, 0), ("b", 8, 32)], 64, 64, "b begins at byte"),
    ],
)
def test_a_gguf_file_with_impossible_places_is_refused(
    tmp_path: Path, tensors: Any, size: int, alignment: int | None, reason: str
) -> None:
    path = gguf_file(tmp_path / "a.gguf", *tensors, size=size, alignment=alignment)
    with pytest.raises(HeadshareError, match=rf"a\.gguf is truncated, corrupt or no GGUF file \({reason}"):
        read_header(path)


def entry(count: int, start: int, end: int, dtype: str = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [count], "data_offsets": [start, end], **more}


def raw(*entries: tuple[str, dict[str, Any]]) -> bytes:
    """A header in which names can stand twice."""
    return ("{" + ", ".join(f"{json.dumps(name)}: {json.dumps(said)}" for name, said in entries) + "}").encode()


def safetensors_file(path: Path, header: bytes, *, length: int | None = None, size: int = 64) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(size))
    return path


WHOLE = ("a", entry(16, 0, 64))
DAMAGED = "is truncated, corrupt or no safetensors file"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (raw(("a", entry(8, 0, 32)), ("b", entry(8, 16, 48))), f"{DAMAGED}.*`b`"),
        (raw(("a", entry(16, 0, 64)), ("b", entry(16, 0, 64))), DAMAGED),
        (raw(("a", entry(8, 0, 32)), ("b", entry(7, 36, 64))), f"{DAMAGED}.*`b`"),
        (raw(("a", entry(8, 32, 64))), f"{DAMAGED}.*`a`"),
        (raw(("a", entry(8, 0, 32))), DAMAGED),
        (raw(("a", entry(32, 0, 128))), DAMAGED),
        (raw(("a", entry(15, 0, 64))), DAMAGED),
        (raw(("a", entry(16, 0, 64, "F16"))), DAMAGED),
        (raw(("a", entry(16, 64, 0))), DAMAGED),
        (raw(("a", entry(16, -64, 0))), DAMAGED),
        (raw(("a", entry(2**62, 0, 64))), DAMAGED),
        (raw(("a", entry(16, 0, 64, "Q9"))), DAMAGED),
        (raw(WHOLE, WHOLE), "a stands more than once in a.safetensors"),
        (raw(("a", entry(16, 0, 64, scale=2))), r"a in a.safetensors has unknown fields \(scale\)"),
    ],
)
def test_a_safetensors_file_with_impossible_places_is_refused(tmp_path: Path, header: bytes, reason: str) -> None:
    with pytest.raises(HeadshareError, match=reason):
        _tensors(safetensors_file(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize("length", [2**63, 2**40, 10**6, 0, 7])
def test_absurd_lengths_of_a_safetensors_header_are_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(HeadshareError, match=DAMAGED):
        _tensors(safetensors_file(tmp_path / "a.safetensors", raw(WHOLE), length=length))


def test_a_sound_safetensors_file_is_read(tmp_path: Path) -> None:
    header = raw(
        ("b", entry(8, 32, 64)), ("a", entry(8, 0, 32)), ("c", entry(0, 0, 0)), ("__metadata__", {"format": "pt"})
    )
    assert set(_tensors(safetensors_file(tmp_path / "a.safetensors", header))) == {"a", "b", "c"}


def _tensors(path: Path) -> list[str]:
    """Names of a file's tensors; HeadshareError that tells of its first problem."""
    found, problems = SafetensorsReader([path]).infos()
    if problems:
        raise HeadshareError(problems[0])
    return list(found)


def test_what_the_safetensors_package_refuses_is_refused(tmp_path: Path) -> None:
    rng, refused = np.random.default_rng(0), 0
    header = raw(("b", entry(8, 32, 64)), ("a", entry(8, 0, 32)), ("__metadata__", {"format": "pt"}))
    for _ in range(2000):
        damaged = np.frombuffer(header, np.uint8).copy()
        damaged[rng.integers(0, len(header), rng.integers(1, 3))] = rng.choice(list(b'0123456789{}[]",:- eFUI'))
        path = safetensors_file(tmp_path / "a.safetensors", damaged.tobytes())
        try:
            with safe_open(path, "numpy") as file:
                names = set(file.keys())
        except SafetensorError:
            refused += 1
            with pytest.raises(HeadshareError):
                _tensors(path)
        else:
            with suppress(HeadshareError):
                assert set(_tensors(path)) == names
    assert 500 < refused < 2000
