"""What one process does for all: the others wait for it, tell how far it is, and fail with it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

# Each process writes down what it does, in order.
PROGRAM = """
import sys, time, jax
from functools import partial
from pathlib import Path
from headshare_jax.errors import HeadshareError, TryAgain
from headshare_jax.processes import turns

address, number, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(number), local_device_ids=[0])
turns._SECONDS_TO_LOOK, turns._SECONDS_TO_SAY = 0.05, 0.0

def work(how, step):
    if how == "silent":
        return time.sleep(3)
    done = Path(folder) / "done"
    if not done.exists():
        for part in range(3):
            time.sleep(0.4)
            step(part + 1, 4)
        if how != "well":
            raise (TryAgain if how == "again" else HeadshareError)("There is no such text.")
        assert int(number) == 0
        done.touch()
    return 7

for how in ("badly", "again", "well", "silent"):
    turns.PATIENCE, told = 0.5 if how == "silent" else 60, []
    try:
        result = turns.first_alone(how, partial(work, how), lambda *steps: told.append(steps))
        print("gives", result, told[:2])
    except HeadshareError as error:
        print(type(error).__name__, error)
turns.PATIENCE = 60
print(turns.first_for_all("once", lambda step: {"by": int(number)}, lambda *steps: None))
"""


def test_the_others_wait_for_the_first(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(number), str(tmp_path)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in processes]
    common = ["HeadshareError There is no such text.", "TryAgain There is no such text.", "gives 7 [(1, 4), (2, 4)]"]
    ends = ["gives None []", "TryAgain Process 0 has said nothing for 0 minutes while silent; look at its log."]
    for end, (out, errors) in zip(ends, said, strict=True):
        assert out.splitlines() == [*common, end, "{'by': 0}"], errors
