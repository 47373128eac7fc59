"""Work that one process does for all of a run: the others wait, and find it done."""

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from headshare_jax.errors import HeadshareError, TryAgain
from headshare_jax.processes.agreement import client, said, unique

T = TypeVar("T")
Step = Callable[[int, int], None]

# Between two looks at how far the first process is, and between two words of it.
_SECONDS_TO_LOOK, _SECONDS_TO_SAY = 1.0, 5.0
# Without a word of it, before the others give up.
PATIENCE = 1800.0


def first_alone(what: str, work: Callable[[Step], T], progress: Step) -> T:
    """Calls a function in the first process, and then in the others; gives its value.

    The others find what the first has made where they see the same storage, and make it themselves where they do not.

    Args:
      what: is being done.
      work: given a function to call with what is done, and the whole.
      progress: called with the same, in the processes that wait too.

    Raises:
      HeadshareError, TryAgain: as `work` in the first process.
      TryAgain: the first process has said nothing for `PATIENCE` seconds.
    """
    if jax.process_index():
        _wait(what, progress)
        return work(progress)
    return _work(what, work, progress, lambda result: None)


def first_for_all(what: str, work: Callable[[Step], Any], progress: Step) -> Any:
    """Calls a function in the first process alone; gives its value, plain data, in all. Else as `first_alone`."""
    if jax.process_index():
        return _wait(what, progress)
    return _work(what, work, progress, lambda result: result)


def _work(what: str, work: Callable[[Step], T], progress: Step, told: Callable[[T], Any]) -> T:
    """The first process's part: its value, of which the others are told some plain data."""
    if jax.process_count() == 1:
        return work(progress)
    key, spoke = unique(what), 0.0

    def step(done: int, total: int) -> None:
        nonlocal spoke
        progress(done, total)
        if time.monotonic() - spoke > _SECONDS_TO_SAY:
            spoke = time.monotonic()
            _say(key, state="working", steps=[done, total])

    try:
        result = work(step)
    except BaseException as error:
        known = isinstance(error, HeadshareError)
        message = str(error) if known else f"Process 0 has stopped while {what}."
        _say(key, state="failed", message=message, again=not known or isinstance(error, TryAgain))
        raise
    _say(key, state="done", told=told(result))
    return result


def _wait(what: str, progress: Step) -> Any:
    """What the first process tells the others when it is done."""
    key, since = unique(what), time.monotonic()
    last: Any = None
    while True:
        words = said(key)
        now = None if words is None else json.loads(words)
        if now and now["state"] == "done":
            return now["told"]
        if now and now["state"] == "failed":
            raise (TryAgain if now["again"] else HeadshareError)(now["message"])
        if now != last:
            last, since = now, time.monotonic()
            progress(*last["steps"])
        if time.monotonic() - since > PATIENCE:
            raise TryAgain(f"Process 0 has said nothing for {PATIENCE / 60:.0f} minutes while {what}; look at its log.")
        time.sleep(_SECONDS_TO_LOOK)


def _say(key: str, **values: Any) -> None:
    client().key_value_set(key, json.dumps(values), allow_overwrite=True)
