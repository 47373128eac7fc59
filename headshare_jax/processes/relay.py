"""What stands between JAX's client and the first process, so that the end of that process does not reach the client.

JAX's client aborts its process at once, with a native stack, when the connection to the coordination service ends; no
callback can be set for it. Through the relay, the connection just falls silent, and `watch` has the last word.
"""

import socket
import threading
import time
from contextlib import suppress

from headshare_jax.processes.meeting import listen

_RETRY_SECONDS = 0.2


def relay(host: str, port: int, seconds: float) -> str:
    """An address on this machine whose connections are carried to another, in threads that end with the process.

    The other side may begin to listen up to so many seconds after a connection.
    """
    listener = listen("127.0.0.1", 0)
    threading.Thread(target=_accept, args=(listener, (host, port), seconds), daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def _accept(listener: socket.socket, address: tuple[str, int], seconds: float) -> None:
    while True:
        near, _ = listener.accept()
        threading.Thread(target=_carry, args=(near, address, seconds), daemon=True).start()


def _carry(near: socket.socket, address: tuple[str, int], seconds: float) -> None:
    far = _connected(address, seconds)
    if far is None:
        near.close()
        return
    for each in (near, far):
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_pump, args=(far, near), daemon=True).start()
    _pump(near, far)
    with suppress(OSError):
        far.shutdown(socket.SHUT_RDWR)


def _connected(address: tuple[str, int], seconds: float) -> socket.socket | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            far = socket.create_connection(address, timeout=5)
        except OSError:
            time.sleep(_RETRY_SECONDS)
            continue
        far.settimeout(None)
        return far
    return None


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Carries bytes one way until either side ends; the target stays open."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
