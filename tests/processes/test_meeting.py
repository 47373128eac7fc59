"""Processes that meet: all come, or each is told why not."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from headshare_jax.errors import HeadshareError, TryAgain
from headshare_jax.processes.meeting import meet


def all_meet(*told: tuple[int, int], seconds: float = 10) -> list[dict[int, socket.socket] | HeadshareError]:
    """What comes of processes that are each told how many there are, and which they are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def one(count: int, me: int) -> dict[int, socket.socket] | HeadshareError:
        try:
            return meet(address, count, me, seconds)
        except HeadshareError as error:
            return error

    with ThreadPoolExecutor(len(told)) as threads:
        return [future.result() for future in [threads.submit(one, *each) for each in told]]


def test_all_come_and_the_first_hears_each() -> None:
    first, second, third = all_meet((3, 0), (3, 1), (3, 2))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert isinstance(third, dict)
    for number, other in ((1, second), (2, third)):
        with other[0] as near, first[number] as far:
            near.sendall(b"word")
            assert far.recv(4) == b"word"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([(2, 0), (3, 1)], "Process 1 was told of 3 processes, and the first one of 2"),
        ([(3, 0), (3, 1), (3, 1)], "Two processes are number 1 of 3"),
    ],
)
def test_processes_that_were_not_started_as_one_run(told: list[tuple[int, int]], said: str) -> None:
    found = all_meet(*told, seconds=3)
    assert all(isinstance(one, HeadshareError) for one in found)
    assert said in str(found[0])
    assert any(said in str(one) for one in found[1:])


def test_an_address_has_a_port() -> None:
    with pytest.raises(HeadshareError, match="no address; write it as address:port"):
        meet("host", 2, 1, 1)


def test_the_first_process_does_not_come() -> None:
    (found,) = all_meet((2, 1), seconds=1)
    assert isinstance(found, TryAgain)
    assert "did not let process 1 in within 1 s" in str(found)
