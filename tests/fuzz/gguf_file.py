"""GGUF headers as plain data, and back, whether or not they make sense."""

import struct
from typing import Any

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class _Reader:
    def __init__(self, content: bytes):
        self.content, self.place = content, 0

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.content, self.place)
        self.place += struct.calcsize(f"<{letter}")
        return value

    def text(self) -> str:
        size = self.number("Q")
        self.place += size
        return self.content[self.place - size : self.place].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            return {"item": item, "values": [self.value(item) for _ in range(count)]}
        return self.number(NUMBERS[kind])


def parsed(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a file as plain data, and what follows it."""
    reader = _Reader(content)
    reader.place = 4
    version, tensors, pairs = reader.number("I"), reader.number("Q"), reader.number("Q")
    header: dict[str, Any] = {"version": version, "pairs": [], "tensors": []}
    for _ in range(pairs):
        key, kind = reader.text(), reader.number("I")
        header["pairs"].append({"key": key, "kind": kind, "value": reader.value(kind)})
    for _ in range(tensors):
        name, axes = reader.text(), reader.number("I")
        shape = [reader.number("Q") for _ in range(axes)]
        header["tensors"].append(
            {"name": name, "shape": shape, "kind": reader.number("I"), "offset": reader.number("Q")}
        )
    return header, content[reader.place :]


def written(header: Any, rest: bytes) -> bytes:
    """A file of a header in which anything may have been changed; what has no form is written as zeros."""
    pairs, tensors = (_list(_dict(header).get(name)) for name in ("pairs", "tensors"))
    out = b"GGUF" + _number("I", _dict(header).get("version")) + _number("Q", len(tensors)) + _number("Q", len(pairs))
    for pair in map(_dict, pairs):
        out += _text(pair.get("key")) + _number("I", pair.get("kind")) + _value(pair.get("kind"), pair.get("value"))
    for tensor in map(_dict, tensors):
        shape = _list(tensor.get("shape"))
        out += _text(tensor.get("name")) + _number("I", len(shape)) + b"".join(_number("Q", size) for size in shape)
        out += _number("I", tensor.get("kind")) + _number("Q", tensor.get("offset"))
    return out + rest


def _value(kind: Any, value: Any) -> bytes:
    if kind == ARRAY:
        item, values = _dict(value).get("item"), _list(_dict(value).get("values"))
        return _number("I", item) + _number("Q", len(values)) + b"".join(_value(item, each) for each in values)
    if kind == STRING:
        return _text(value)
    return _number(NUMBERS.get(kind, "I") if isinstance(kind, int) else "I", value)


def _number(letter: str, value: Any) -> bytes:
    size = struct.calcsize(f"<{letter}")
    if isinstance(value, int) and letter not in "fd?":
        return (int(value) % 2 ** (8 * size)).to_bytes(size, "little")
    try:
        return struct.pack(f"<{letter}", value)
    except (struct.error, OverflowError, TypeError):
        return bytes(size)


def _text(value: Any) -> bytes:
    content = str(value).encode(errors="surrogatepass")
    return len(content).to_bytes(8, "little") + content


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
