"""A model on the devices of two processes, read by the first of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import compiled
import numpy as np
import pytest
import tiny_cli_model
from support import sharing_by_hand

import headshare_jax as hs
from headshare_jax.parameters import parameter_names
from headshare_jax.sharing import source
from headshare_jax.sharing.view import SharedView, cast

_WORK = """
import sys
import jax
number, address, folder, pieces = int(sys.argv[1]), *sys.argv[2:5]
jax.distributed.initialize(address, 2, number)
import headshare_jax as hs
from headshare_jax.model import gather
from headshare_jax.model.lent import lent
from headshare_jax.model.llama import Llama
from headshare_jax.model.mesh import make_mesh
from headshare_jax.convert import map_file
from headshare_jax.sharing import source
from pathlib import Path
gather.PIECE_BYTES = int(pieces)
source.TABLE_BYTES = 4 * int(pieces)
folder = Path(folder)
model = Llama.of(hs.open_checkpoint(folder / "model"), mesh=make_mesh((1, 4, 2)))
assert not model.array("embed_vd").is_fully_addressable
view = hs.SharedView(model, map_file.read(folder / "map.json"), check_source=False)
with lent(view, "bfloat16") as mine:
    assert (mine is None) == (number == 1)
    if mine is not None:
        hs.save(mine, folder / "shared")
with lent(model) as mine:
    if mine is not None:
        hs.save(mine, folder / "hf", to="hf")
print(gather._piece._cache_size())
"""


def test_the_first_process_writes_what_lies_on_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_cli_model.saved(tmp_path / "model")
    dense = hs.load(tmp_path / "model")
    sharing = sharing_by_hand(dense, "qkv", {2: 0, 3: 1})
    (tmp_path / "map.json").write_text(sharing.to_json())
    # No slice is gathered in one piece.
    pieces = dense.read("embed_vd").nbytes // 16
    run_two(_WORK, tmp_path, str(pieces))
    # Tables are read a part at a time, and so they lie in as many chunks.
    monkeypatch.setattr(source, "TABLE_BYTES", 4 * pieces)
    expected = cast(SharedView(dense, sharing, check_source=False), "bfloat16")
    hs.save(expected, tmp_path / "expected")
    for path in (tmp_path / "expected").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "shared" / path.relative_to(tmp_path / "expected")).read_bytes()
    written = hs.load(tmp_path / "hf")
    for name in parameter_names(dense.config):
        assert np.array_equal(written.array(name), dense.array(name)), name


def run_two(code: str, folder: Path, *more: str) -> None:
    """Runs code in two processes of four devices each, with their number, an address and a folder for arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": compiled.flags(4)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number), address, str(folder), *more],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    for process in processes:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
