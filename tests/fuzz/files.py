"""A damaged file in the place of a valid one, and a command that reads it."""

import json
from collections.abc import Callable

from hypothesis import strategies as st

from fuzz.mutate import damaged, json_text
from fuzz.oracle import Input
from fuzz.seeds import Seeds

Inputs = st.SearchStrategy[Input]


def in_json(kind: str, file: str, *commands: tuple[str, ...], seeds: tuple[str, ...] = ()) -> Callable[[Seeds], Inputs]:
    """A JSON file, or of another kind bytes, of a seed: changed, and read by one of the commands."""

    def make(made: Seeds) -> Inputs:
        content = made.read(file)
        return in_file(kind, file, json_text(json.loads(content)), commands, (file.partition("/")[0], *seeds), made)

    return make


def in_file(
    kind: str,
    file: str,
    contents: st.SearchStrategy[bytes],
    commands: tuple[tuple[str, ...], ...],
    seeds: tuple[str, ...],
    made: Seeds,
) -> Inputs:
    for seed in seeds:
        made.path(seed)
    return st.builds(
        lambda content, args: Input(kind, args, {file: content}, tuple(dict.fromkeys(seeds))),
        contents,
        st.sampled_from(commands),
    )


def in_bytes(
    kind: str, file: str, *commands: tuple[str, ...], seeds: tuple[str, ...] = ()
) -> Callable[[Seeds], Inputs]:
    def make(made: Seeds) -> Inputs:
        return in_file(kind, file, damaged(made.read(file)), commands, (file.partition("/")[0], *seeds), made)

    return make
