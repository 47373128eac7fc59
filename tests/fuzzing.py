"""Damaged files: whatever is in them, they open or are refused with a HeadshareError."""

from contextlib import suppress
from pathlib import Path

from hypothesis import strategies as st

import headshare_jax
from headshare_jax import HeadshareError, parameters
from headshare_jax.convert.gguf_header import read_header
from headshare_jax.sharing.source import assemble


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """A few bytes replaced, and perhaps an end cut off."""
    changed = bytearray(content)
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
    ):
        changed[place] = byte
    return bytes(changed[: data.draw(st.one_of(st.none(), st.integers(0, len(content))))])


def open_or_refuse(path: Path) -> None:
    """Reads a whole checkpoint; any error but HeadshareError comes through."""
    with suppress(HeadshareError):
        source = headshare_jax.open_checkpoint(path)
        for name in parameters.parameter_names(source.config):
            assemble(source, name)


def damage_gguf_header(good: Path, path: Path, data: st.DataObject) -> None:
    """Writes a GGUF file with its header damaged, and opens or refuses it."""
    content = good.read_bytes()
    header = min(tensor.offset for tensor in read_header(good).tensors.values())
    path.write_bytes(damaged(content[:header], data) + content[header:])
    open_or_refuse(path)
