"""Signals that ask for a stop are heard even where Python cannot run a handler."""

import signal
import subprocess
import sys
import time

import pytest

# A library's call that never returns, as a collective with a process that is gone.
_HANGS = """
import ctypes, signal
from headshare_jax.signals import handled, insistent

with handled(lambda number, frame: None), insistent(0.5):
    print("ready", flush=True)
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_process_that_hangs(number: signal.Signals) -> None:
    # Where tests run in the background, a process begins with SIGINT ignored.
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = subprocess.Popen([sys.executable, "-c", hears + _HANGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for _ in range(2):
            assert process.poll() is None
            process.send_signal(number)
            time.sleep(0.2)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + number
    assert said == b"headshare: stopped at the second signal, without a checkpoint.\n"
