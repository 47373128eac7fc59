"""Two processes with one mesh: each reads its share of a model, and what they compute together is what one computes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import compiled
import numpy as np
import pytest
import support

import headshare_jax as hs
from headshare_jax.parameters import parameter_names
from headshare_jax.sharing.view import cast

SHARED = {5: 0, 9: 2}
TEXT = support.random_tokens((12 * 16,))
# What each process runs: its number, the address of the first, and the model's folder.
PROGRAM = """
import json, pathlib, sys
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
import numpy as np
import support
from jax.experimental.multihost_utils import process_allgather
import headshare_jax as hs
from headshare_jax.model.mesh import make_mesh
from headshare_jax.model.place import place
from headshare_jax.parameters import parameter_names
from headshare_jax.sharing.view import View, cast
from test_together import SHARED, TEXT

class Counted(View):
    count = 0

    def read(self, name, layer=None, rows=None):
        values = super().read(name, layer, rows)
        self.count += values.nbytes
        return values

source = Counted(hs.open_checkpoint(sys.argv[3]))
names, mesh = parameter_names(source.config), make_mesh((1, 2, 4))
placed = place(source, names, mesh)
read = source.count
held = sum(shard.data.nbytes for array in placed.values() for shard in array.addressable_shards)
expected = hs.load(sys.argv[3])
same = all(
    np.array_equal(shard.data, np.asarray(expected.array(name))[shard.index])
    for name, array in placed.items() for shard in array.addressable_shards
)
model = hs.Llama.of(source, mesh=mesh)
found = hs.perplexity(model, TEXT, seq_len=16)
sharing = support.sharing_by_hand(expected, "qkv", SHARED)
fitted = {}
for kind, dense in {"disk": source, "mesh": model}.items():
    shared = hs.SharedView(dense, sharing, check_source=False)
    repaired, _ = hs.refit(dense, shared, TEXT.reshape(12, 16), mesh=mesh)
    fitted[kind] = process_allgather(repaired.array("o_pool_phd"), tiled=True).ravel().tolist()
agreement = hs.agreement(model, hs.Llama.of(cast(repaired, "bfloat16"), mesh=mesh), TEXT.reshape(12, 16))
said = json.dumps({
    "read": read, "held": held, "same": same, "perplexity": found.token_perplexity, "fitted": fitted,
    "kl": agreement.kl, "after": agreement.after,
})
pathlib.Path(sys.argv[3], f"said-{sys.argv[1]}.json").write_text(said)
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_read_half(tmp_path: Path) -> None:
    dense = support.tiny_model(num_hidden_layers=8, hidden_size=256, intermediate_size=1024)
    hs.save(dense, tmp_path / "model")
    found = together(tmp_path / "model")
    windows_wt = TEXT.reshape(12, 16)
    shared = hs.share(dense, support.sharing_by_hand(dense, "qkv", SHARED))
    repaired, _ = hs.refit(dense, shared, windows_wt)
    o_pool = np.asarray(repaired.array("o_pool_phd")).ravel()
    expected = hs.agreement(dense, hs.Llama.of(cast(repaired, "bfloat16")), windows_wt)
    for said in found:
        assert said["same"]
        assert said["read"] <= 1.05 * said["held"]
        assert said["perplexity"] == pytest.approx(hs.perplexity(dense, TEXT, seq_len=16).token_perplexity, rel=1e-6)
        for fitted in said["fitted"].values():
            assert np.linalg.norm(np.array(fitted) - o_pool) < 1e-5 * np.linalg.norm(o_pool)
        assert said["after"] == pytest.approx(expected.after, rel=1e-5)
    whole = sum(array.nbytes for array in (dense.array(name) for name in parameter_names(dense.config)))
    assert sum(said["read"] for said in found) >= whole


def together(model: Path) -> list[dict[str, Any]]:
    """What two processes of four devices each say, in files: a pipe that is read late would hold one of them up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "XLA_FLAGS": compiled.flags(4),
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(number), address, str(model)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=600)[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
    return [json.loads((model / f"said-{number}.json").read_text()) for number in range(2)]
