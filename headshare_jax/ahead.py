"""Values computed in threads a little ahead of where they are wanted, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int, waiting: int) -> Iterator[R]:
    """The function's values of all items.

    Args:
      function: called in one of the threads, or without threads where it is needed.
      items: taken as they are needed.
      threads: how many there are; 0 for none.
      waiting: most values that are computed or in work before they are wanted.
    """
    if not threads:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[R]] = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > waiting:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            # After an error, nothing more is begun.
            for future in running:
                future.cancel()
