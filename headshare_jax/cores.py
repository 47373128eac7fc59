"""Small linear algebra, shared out among cores."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Found = TypeVar("Found")


def on_cores(function: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """What a function gives for each of some items, each on one core.

    For matrices of a head's width: BLAS would share out one of them among all cores, and then mostly wait.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(function, items))
