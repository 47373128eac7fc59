"""What processes tell each other on the host: that they have come to a place, and that they are about the same work.

It goes over JAX's coordination service and not over the devices, so that it may be called from any thread, and fails
where a collective would hang. A process that is gone is no matter here: `watch` ends the others.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax._src import distributed

from headshare_jax.errors import HeadshareError, TryAgain, explained

_DAY_MS, _PATIENCE_MS = 24 * 3600 * 1000, 30 * 1000
# Times that each name was used, which is the same in all processes.
_uses: Counter[str] = Counter()
_counting = threading.Lock()


def wait_for_all(name: str) -> None:
    """Returns once every process has come to the place of this name."""
    if jax.process_count() > 1:
        client().wait_at_barrier(unique(name), _DAY_MS)


def from_first(name: str, value: str) -> str:
    """The first process's value, in all processes; those of the others are not looked at."""
    if jax.process_count() == 1:
        return value
    key = unique(name)
    if jax.process_index() == 0:
        client().key_value_set(key, value)
    return str(client().blocking_key_value_get(key, _DAY_MS))


@contextmanager
def together(name: str) -> Iterator[dict[str, object]]:
    """Work that all processes come through, or none: what one cannot do, all refuse.

    The block may fill in the mapping that it is given with what must be the same everywhere, by names to say it by.

    Raises:
      HeadshareError: a process raised one in the block (this one's own, or what the other said), or the values differ.
    """
    values: dict[str, object] = {}
    if jax.process_count() == 1:
        yield values
        return
    key, raised = unique(name), None
    try:
        yield values
    except HeadshareError as error:
        raised = error
    except OSError as error:
        raised = HeadshareError(explained(error))
    mine = {
        "values": {name: str(value) for name, value in values.items()},
        "error": None if raised is None else str(raised),
        "again": isinstance(raised, TryAgain),
    }
    if raised is not None:
        # The others may wait for this process in the block; they are told when it ends.
        with suppress(jax.errors.JaxRuntimeError):
            _verdict(key, mine, _PATIENCE_MS)
        raise raised
    verdict = _verdict(key, mine, _DAY_MS)
    if verdict:
        raise (TryAgain if verdict["again"] else HeadshareError)(verdict["said"])


def say_first(key: str, value: str) -> str:
    """What a key stands for: this value, unless another process was first to say one."""
    try:
        client().key_value_set(key, value)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
    return str(client().blocking_key_value_get(key, _DAY_MS))


def said(key: str) -> str | None:
    """What a key stands for now; None if nobody has said it yet."""
    try:
        return str(client().key_value_try_get(key))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None


def _verdict(key: str, mine: Mapping[str, object], milliseconds: int) -> dict[str, Any]:
    """What the first process makes of what all have to say; empty if all is well."""
    service, me = client(), jax.process_index()
    service.key_value_set(f"{key}/{me}", json.dumps(mine))
    if me == 0:
        answers = [
            json.loads(service.blocking_key_value_get(f"{key}/{number}", milliseconds))
            for number in range(jax.process_count())
        ]
        service.key_value_set(f"{key}/verdict", json.dumps(_judged(answers)))
    verdict: dict[str, Any] = json.loads(service.blocking_key_value_get(f"{key}/verdict", milliseconds))
    # All have read it before the first process may end.
    service.wait_at_barrier(f"{key}/read", milliseconds)
    return verdict


def _judged(answers: list[dict[str, Any]]) -> dict[str, Any]:
    for number, one in enumerate(answers):
        if one["error"] is not None:
            return {"said": f"Process {number} of {len(answers)} stopped: {one['error']}", "again": one["again"]}
    differences = differing([one["values"] for one in answers])
    if differences:
        return {"said": f"The processes do not agree: {'; '.join(differences)}. Give all the same.", "again": False}
    return {}


def differing(values: list[Mapping[str, str]]) -> list[str]:
    """What differs between processes, named by process."""
    names = dict.fromkeys(name for one in values for name in one)
    found = []
    for name in names:
        others: dict[str, list[int]] = {}
        for number, one in enumerate(values):
            others.setdefault(one.get(name, "not there"), []).append(number)
        if len(others) > 1:
            told = ", ".join(f"{value} in {_processes(numbers)}" for value, numbers in list(others.items())[:4])
            found.append(f"{name} is {told}")
    return found


def _processes(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"


def unique(name: str) -> str:
    """A key for what goes by a name, another one each time."""
    with _counting:
        _uses[name] += 1
        return f"headshare/{name}/{_uses[name]}"


def client() -> Any:
    """Of JAX's coordination service."""
    return distributed.global_state.client
