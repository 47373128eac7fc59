"""Command lines: any command with any of its options, and values that are often wrong."""

import types
import typing
from dataclasses import MISSING, fields
from typing import Any

import tyro
from hypothesis import strategies as st

from fuzz.oracle import Input
from fuzz.seeds import Seeds
from headshare_jax import cli

MODELS = ("hf", "native", "compact", "model.gguf", "bin", "shared-hf")
FILES = ("map.json", "budget.json", "text.txt", "rows.jsonl", "rows.parquet", "recipe.yaml")
NAMES = (
    *MODELS, *FILES, "out", "out.gguf", "out.json", "out.png", "out.npz", "new/out", "hf/out", "hf/config.json",
    "taken", "taken.txt", ".", "..",
    "../x", "", " ", "-", "--", "--json", "a b", "o[/x]", "[red]", "é漢🙂", "x" * 300, "x/" * 3000, "a\nb", "\udcff",
    "~", "$HOME", "*", "absent",
    "absent/absent", "owner/model", "no such.txt", "wikitext:raw:test", "https://example.org/x", "{}", "%s", "'",
    '"', "\\",
)  # fmt: skip
NUMBERS = (
    "0", "1", "-1", "2", "3", "16", "64", "0.3", "0.5", "0.999", "1.0", "-0.1", "1e-300", "1e300", "nan", "inf",
    "-inf", "1_0", "٣", "0x10",
    "9" * 30, "1e9", "12288", "true", "None", "", "½",
)  # fmt: skip
WORDS = (
    "direct", "fitted", "plan", "refit", "random", "drop", "functional", "qk", "qkv", "v", "total", "native", "hf",
    "hf-compact", "gguf", "q8_0", "f16",
    "Q4_K", "float32", "bfloat16", "float16", "float8", "", "resolve", "forbid", "decode", "prefill", "postshare",
    "v5e:2x2", "v5p:4x4x4", "v9:1",
    "0.1,0.3", "0.1,,x", ",", "direct,random", "role", "é", "[/b]", "llama-2-7b", "data.seq_len=8", "a=b", "=",
)  # fmt: skip
# Other machines and the network, and what takes minutes by design.
LEFT_OUT = ("distributed", "coordinator", "processes", "process", "tasks", "task_folder")
_VALUES = {int: NUMBERS, float: NUMBERS, str: WORDS + NAMES}


def command_lines(made: Seeds) -> st.SearchStrategy[Input]:
    """Any command line, in a folder with models, texts, maps and a few files in the way."""
    for seed in (*MODELS, *FILES):
        made.path(seed)
    in_the_way = {"taken/notes.txt": b"a thesis", "taken.txt": b"a thesis"}

    @st.composite
    def draw_line(draw: st.DrawFn) -> Input:
        name = draw(st.sampled_from(list(cli.COMMANDS)))
        args = [name, *_fitting(draw, name), *_options(draw, name)]
        if draw(st.integers(0, 19)) == 0:
            args = draw(st.lists(st.sampled_from([*args, *NAMES, *WORDS, "--help"]), min_size=1, max_size=6))
        if args[:1] == ["plan"] and "--host" not in args:
            args.append("--host")
        if args[:1] == ["postshare"] and "--dry-run" not in args:
            args.append("--dry-run")
        if args[:1] == ["demo"] and len(args) < 2:
            args.append("hf")
        used = tuple(
            seed for seed in (*MODELS, *FILES) if seed in ("hf", "text.txt") or any(seed in arg for arg in args)
        )
        return Input("command line", tuple(args), in_the_way, used)

    return draw_line()


def _fitting(draw: st.DrawFn, name: str) -> list[str]:
    """Arguments with which the command would do something; one of them is changed, now and then."""
    model = draw(st.sampled_from(MODELS))
    text = ["--text", draw(st.sampled_from(["text.txt", "rows.jsonl", "rows.parquet"])), "--seq-len", "16"]
    args = {
        "demo": [model, "--windows", "1", "-o", "out"],
        "convert": [model, "out", "--to", draw(st.sampled_from(["native", "hf", "hf-compact"]))],
        "match": [model],
        "share": ["hf", "out", "--ratio", "0.3", "--method", "direct"],
        "sweep": ["hf", "-o", "out", *text, "--ratios", "0.3", "--methods", "direct", "--max-windows", "2"],
        "postshare": ["--config", "recipe.yaml", "-o", "run"],
        "eval": [model, *text],
        "generate": [model, "--prompt", "a b", "--max-new-tokens", "2"],
        "inspect": [model],
        "plan": ["llama-2-7b", "--topology", "v5e:2x2"],
    }.get(name, [model])
    if draw(st.integers(0, 3)) == 0:
        args[draw(st.integers(0, len(args) - 1))] = draw(st.sampled_from(NAMES + NUMBERS + WORDS))
    return args


def _options(draw: st.DrawFn, name: str) -> list[str]:
    hints = typing.get_type_hints(cli.COMMANDS[name], include_extras=True)
    known = [
        field
        for field in fields(cli.COMMANDS[name])
        if field.name not in LEFT_OUT and not _positional(hints[field.name])
    ]
    args: list[str] = []
    for field in draw(st.lists(st.sampled_from(known), max_size=3, unique_by=lambda field: field.name)):
        args.append(f"--{field.name.replace('_', '-')}")
        kinds = _kinds(hints[field.name])
        if bool in kinds and field.default is not MISSING:
            continue
        values = [value for kind in kinds for value in _VALUES.get(kind, NAMES)] or list(NAMES)
        args += [draw(st.sampled_from(values)) for _ in range(draw(st.sampled_from([1, 1, 1, 1, 0, 2])))]
    return args


def _positional(hint: Any) -> bool:
    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


def _kinds(hint: Any) -> set[Any]:
    """The plain types in a hint."""
    origin = typing.get_origin(hint)
    if origin is None:
        return {hint} - {type(None), Ellipsis}
    if origin is typing.Annotated:
        return _kinds(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType, tuple, list):
        return set().union(*(_kinds(part) for part in typing.get_args(hint)))
    return {hint}
