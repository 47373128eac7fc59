"""Damage: valid bytes and plain data, changed a little in every way that a stranger's file may differ."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NAN, INF = float("nan"), float("inf")
# What no field expects, and what many forget.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, -(2**63), 10**12, 10**30,
    0.0, -0.0, 0.5, 1e-320, 1e308, NAN, INF, -INF,
    "", " ", "abc", "1", "NaN", "a" * 5000, "\ud83d", "\x00", "é漢🙂", "[/x]", "../../x", "/etc/passwd", "{{ 9**9 }}",
    "a\nb",
    [], [0], [None], [[]], [1] * 100, {}, {"a": 1}, {"": {"": []}}, {"kind": "llama3"},
]  # fmt: skip


def odd() -> st.SearchStrategy[Any]:
    """A value that a field was not made for."""
    deep = st.integers(1, 3).map(lambda power: _nested(10**power))
    return st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=20), deep)


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(min(depth, 300)):
        value = [value]
    return value


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """A few bytes replaced, bits flipped, pieces cut out or doubled, and perhaps an end cut off."""
    if not content:
        return st.binary(max_size=20)

    @st.composite
    def draw_damage(draw: st.DrawFn) -> bytes:
        changed = bytearray(content)
        places = st.integers(0, len(content) - 1)
        for place, byte in draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
            changed[place] = byte
        for place, bit in draw(st.lists(st.tuples(places, st.integers(0, 7)), max_size=2)):
            changed[place] ^= 1 << bit
        begin, size = draw(places), draw(st.sampled_from([0, 0, 1, 8, 64]))
        piece = changed[begin : begin + size]
        changed[begin : begin + size] = draw(st.sampled_from([b"", piece * 2, piece + b"\xff" * 8])) if size else piece
        return bytes(changed[: draw(st.one_of(st.none(), st.integers(0, len(changed))))])

    return draw_damage()


def changed(document: Any) -> st.SearchStrategy[Any]:
    """Plain data with one to three of its values left out, doubled, renamed, or put in place of another."""

    @st.composite
    def draw_change(draw: st.DrawFn) -> Any:
        value = copy.deepcopy(document)
        for _ in range(draw(st.integers(1, 3))):
            value = _changed_once(draw, value)
        return value

    return draw_change()


def _changed_once(draw: st.DrawFn, value: Any) -> Any:
    places = list(_places(value))
    if not places:
        return draw(odd())
    holder, key = draw(st.sampled_from(places))
    action = draw(st.sampled_from(["odd", "odd", "odd", "leave out", "another", "list", "add", "rename", "scale"]))
    match action:
        case "leave out":
            del holder[key]
        case "another":
            other_holder, other_key = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(other_holder[other_key])
        case "list":
            holder[key] = [holder[key]] * draw(st.sampled_from([0, 1, 2, 1000]))
        case "add" if isinstance(holder, dict):
            holder[draw(st.text(max_size=10))] = draw(odd())
        case "rename" if isinstance(holder, dict):
            holder[str(key)[:-1]] = holder.pop(key)
        case "scale" if isinstance(holder[key], int | float):
            holder[key] = draw(st.sampled_from([-1, 2, 3, 1000, 10**9])) * holder[key]
        case _:
            holder[key] = draw(odd())
    return value


def _places(value: Any, most: int = 400) -> Iterator[tuple[Any, Any]]:
    """Holders and keys of all that is inside, of long lists a few."""
    waiting = [value]
    while waiting and most:
        holder = waiting.pop()
        keys = (
            list(holder) if isinstance(holder, dict) else list(range(len(holder))) if isinstance(holder, list) else []
        )
        for key in keys if len(keys) < 60 else keys[:8] + keys[-8:]:
            most -= 1
            yield holder, key
            waiting.append(holder[key])


def json_text(document: Any) -> st.SearchStrategy[bytes]:
    """A JSON file that says something else than it did, or nothing that can be read."""
    text = json.dumps(document).encode()
    nested = st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b'"' + b"a" * 10**6 + b'"'])
    return st.one_of(
        changed(document).map(lambda value: json.dumps(value).encode()),
        changed(document).map(lambda value: json.dumps(value).encode()),
        damaged(text),
        st.tuples(st.integers(0, len(text)), nested).map(lambda cut: text[: cut[0]] + cut[1] + text[cut[0] :]),
        # A key that stands twice.
        changed(document).map(lambda value: text.rstrip()[:-1] + b"," + json.dumps(value).encode()[1:]),
        st.sampled_from(["utf-16", "utf-8-sig", "latin-1"]).map(lambda encoding: text.decode().encode(encoding)),
    )
