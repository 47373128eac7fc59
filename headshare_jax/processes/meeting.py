"""How the processes of a run meet: each of the others opens a connection to the first, and keeps it."""

import json
import socket
import time
from collections.abc import Collection
from contextlib import ExitStack, suppress
from typing import Any

from headshare_jax.errors import HeadshareError, TryAgain

_RETRY_SECONDS = 0.5


def meet(address: str, count: int, me: int, seconds: float) -> dict[int, socket.socket]:
    """Returns when all processes have come: the first one's connections to the others, or the one to the first.

    Nothing listens at the first one's port afterwards.

    Raises:
      TryAgain: some did not come within so many seconds, or the port is taken.
      HeadshareError: the address is none, or they were not started as one run.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise HeadshareError(f"{address!r} is no address; write it as address:port.", option="coordinator")
    deadline = time.monotonic() + seconds
    if me == 0:
        return _wait_for_others(int(port), count, deadline, seconds)
    return {0: _find_first(host.strip("[]"), int(port), count, me, deadline, seconds)}


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, on all addresses of this machine if `host` is empty."""
    if host or not socket.has_dualstack_ipv6():
        return socket.create_server((host, port), backlog=128)
    return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)


def _wait_for_others(port: int, count: int, deadline: float, seconds: float) -> dict[int, socket.socket]:
    try:
        listener = listen("", port)
    except OSError as error:
        raise TryAgain(f"Port {port} of the first process cannot be used ({error.strerror}); name another.") from error
    found: dict[int, socket.socket] = {}
    with listener, ExitStack() as unless_all_come:
        while len(found) < count - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise TryAgain(_missing(count, found, seconds)) from None
            unless_all_come.callback(connection.close)
            hello = _read_hello(connection)
            if hello is None:  # what looks for open ports, for instance
                connection.close()
                continue
            number, told = hello
            if told != count or not 0 < number < count or number in found:
                said = (
                    f"Process {number} was told of {told} processes, and the first one of {count}; give all the same."
                    if told != count
                    else f"Two processes are number {number} of {count}; give each its own."
                )
                for other in (connection, *found.values()):
                    _say(other, {"refused": said})
                raise HeadshareError(said, option="processes" if told != count else "process")
            found[number] = connection
        unless_all_come.pop_all()
    # Only now is the port free for what is to listen there.
    for connection in found.values():
        _say(connection, {"all": True})
    return found


def _missing(count: int, found: Collection[int], seconds: float) -> str:
    missing = [str(number) for number in range(1, count) if number not in found]
    names = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
    return (
        f"Of {count} processes {len(missing)} did not come within {seconds:.0f} s (number {names}); start all of them, "
        "or give their true number."
    )


def _find_first(host: str, port: int, count: int, me: int, deadline: float, seconds: float) -> socket.socket:
    while (left := deadline - time.monotonic()) > 0:
        with suppress(OSError):
            connection = socket.create_connection((host, port), timeout=left)
            try:
                _say(connection, {"process": me, "processes": count})
                answer = _read_line(connection)
                if "refused" in answer:
                    raise HeadshareError(str(answer["refused"]))
                if answer:
                    return connection
            except BaseException:
                connection.close()
                raise
            connection.close()
        # It is not there yet, or what was there was another.
        time.sleep(min(_RETRY_SECONDS, max(0.0, left)))
    raise TryAgain(
        f"The first process, at {host}:{port}, did not let process {me} in within {seconds:.0f} s; start all {count}, "
        "and see that the address can be reached."
    )


def _read_hello(connection: socket.socket) -> tuple[int, int] | None:
    """Number of a process and of all, as it was told; None from what is none."""
    connection.settimeout(5)
    with suppress(OSError, ValueError, KeyError, TypeError):
        hello = _read_line(connection)
        return int(hello["process"]), int(hello["processes"])
    return None


def _read_line(connection: socket.socket) -> dict[str, Any]:
    """One line of JSON; empty where the connection ends before."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 2000:
        # Nothing after the line may be taken.
        byte = connection.recv(1)
        if not byte:
            return {}
        line += byte
    found = json.loads(line)
    return found if isinstance(found, dict) else {}


def _say(connection: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")
