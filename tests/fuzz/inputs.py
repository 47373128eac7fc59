"""Inputs of every kind: files of strangers with a command that reads them, and command lines."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st

from fuzz import gguf_file
from fuzz.command_lines import command_lines
from fuzz.mutate import changed, damaged, json_text, odd
from fuzz.oracle import Input
from fuzz.seeds import SWEEP, WORK, Seeds

Inputs = st.SearchStrategy[Input]

_INSPECT, _EVAL = ("inspect", "hf"), ("eval", "hf", "--text", "text.txt", "--seq-len", "16", "--max-windows", "2")
# With a chat template, and without; every token goes through the tokenizer both ways.
_GENERATE = ("generate", "hf", "--prompt", "aé 1", "--max-new-tokens", "2")
_CONVERT = ("convert", "hf", "out", "--to", "native")


def _file(kind: str, file: str, *commands: tuple[str, ...], seeds: tuple[str, ...] = ()) -> Callable[[Seeds], Inputs]:
    """A JSON file, or of another kind bytes, of a seed: changed, and read by one of the commands."""

    def make(made: Seeds) -> Inputs:
        content = made.read(file)
        return _inputs(kind, file, json_text(json.loads(content)), commands, (file.partition("/")[0], *seeds), made)

    return make


def _inputs(
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


def _bytes(kind: str, file: str, *commands: tuple[str, ...], seeds: tuple[str, ...] = ()) -> Callable[[Seeds], Inputs]:
    def make(made: Seeds) -> Inputs:
        return _inputs(kind, file, damaged(made.read(file)), commands, (file.partition("/")[0], *seeds), made)

    return make


def _safetensors(made: Seeds) -> Inputs:
    content = made.read("hf/model.safetensors")
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])

    def file(parts: tuple[bytes, int | None]) -> bytes:
        text, length = parts
        return (len(text) if length is None else length % 2**64).to_bytes(8, "little") + text + content[8 + size :]

    lengths = st.sampled_from([None, None, None, None, 0, 2**31, 2**63, 2**64 - 1, 100_000_000])
    contents = st.one_of(st.tuples(json_text(header), lengths).map(file), damaged(content))
    return _inputs("safetensors", "hf/model.safetensors", contents, (_INSPECT, _CONVERT), ("hf",), made)


def _gguf(made: Seeds) -> Inputs:
    header, rest = gguf_file.parsed(made.read("model.gguf"))
    settings = {**header, "pairs": [pair for pair in header["pairs"] if not isinstance(pair["value"], dict)]}
    contents = st.one_of(
        changed(header).map(lambda value: gguf_file.written(value, rest)),
        # Of the settings alone, among which others are not drowned by the tokenizer.
        changed(settings).map(lambda value: gguf_file.written(value, rest)),
        damaged(made.read("model.gguf")[:20_000]),
    )
    return _inputs(
        "gguf",
        "model.gguf",
        contents,
        (("inspect", "model.gguf"), ("convert", "model.gguf", "out", "--to", "hf")),
        ("model.gguf",),
        made,
    )


def _gguf_tokenizer(made: Seeds) -> Inputs:
    header, rest = gguf_file.parsed(made.read("model.gguf"))
    words = [pair for pair in header["pairs"] if pair["key"].startswith("tokenizer.")]
    others = [pair for pair in header["pairs"] if pair not in words]
    kinds = {"gpt2": {}, "llama": {"scores": {"item": 6, "values": [0.5] * 259}}}
    contents = st.tuples(changed(words), st.sampled_from(list(kinds))).map(
        lambda drawn: gguf_file.written({**header, "pairs": others + _with(drawn[0], drawn[1], kinds[drawn[1]])}, rest)
    )
    commands = (("generate", "model.gguf", "--prompt", "a b", "--max-new-tokens", "1"),)
    return _inputs("gguf tokenizer", "model.gguf", contents, commands, ("model.gguf",), made)


def _with(pairs: list[Any], model: str, more: Mapping[str, Any]) -> list[Any]:
    """A tokenizer's metadata with another kind of model, and what that needs."""
    swapped = [
        pair | {"value": model} if isinstance(pair, dict) and pair.get("key") == "tokenizer.ggml.model" else pair
        for pair in pairs
    ]
    return swapped + [
        {"key": f"tokenizer.ggml.{name}", "kind": gguf_file.ARRAY, "value": value} for name, value in more.items()
    ]


_BLOCKS = (
    "{{ m }}", "{{ messages }}", "{{ m['content'] }}", "{{ 'a' * 10**10 }}", "{{ 'ab' * 1000 }}",
    "{{ range(10**9) }}", "{{ 9**9**7 }}",
    "{{ '%099999999999d' % 1 }}", "{{ 'a'.center(10**10) }}", "{{ lipsum(n=3000) }}", "{{ ''.__class__.mro() }}",
    "{{ raise_exception('[/x] no') }}", "{{ namespace().x.y }}", "{{ messages[7].content }}",
    "{{ undefined_thing() }}",
    "{{ strftime_now('%Y' * 999) }}", "{{ (1/0) }}", "{% set x = x ~ x %}", "{{ 'é\ud83d' }}", "{{ cycler }}",
    "{% include 'x' %}",
    "{% import '/etc/passwd' as x %}", "{% extends 'x' %}", "{{ messages | map(attribute='role') | list }}",
    "{{ [1] * 10**8 }}",
    "{{ messages | tojson(indent=10**9) }}", "{% break %}", "{% generation %}{% endgeneration %}",
    "{{ 'x' | indent(10**9) }}",
)  # fmt: skip
# Around what stands at the sign.
_AROUND = (
    "@", "@@@", "{% for m in messages %}@{% endfor %}", "{% for i in range(90000) %}@{% endfor %}", "{% if @ %}",
    "{% macro m() %}@{{ m() }}{% endmacro %}{{ m() }}", "{% set m = 3 %}@",
)  # fmt: skip


def _template(made: Seeds) -> Inputs:
    settings = json.loads(made.read("hf/tokenizer_config.json"))
    block = st.one_of(st.sampled_from(_BLOCKS), st.text(max_size=10))
    template = st.recursive(
        block,
        lambda inner: st.tuples(st.sampled_from(_AROUND), inner).map(
            lambda drawn: (
                drawn[0]
                .replace("{{", "\0")
                .replace("}}", "\1")
                .replace("{0}", drawn[1])
                .replace("\0", "{")
                .replace("\1", "}")
            )
        ),
        max_leaves=3,
    )
    contents = template.map(lambda text: json.dumps(settings | {"chat_template": text}).encode())
    commands = ((*_GENERATE, "--chat"),)
    return _inputs("chat template", "hf/tokenizer_config.json", contents, commands, ("hf",), made)


_PATTERNS = (
    "(a+)+$",
    "(",
    "",
    "(?=(a*)*b)",
    r"\p{Nope}",
    "(?<!a*)b",
    "a{1000000}",
    "(a|a)*b",
    "[",
    "(?i:é)",
    r"\s+(?!\S)",
    "." * 5000,
    "((((((a*)*)*)*)*)*)b",
)


def _tokenizer(made: Seeds) -> Inputs:
    whole = json.loads(made.read("hf/tokenizer.json"))
    pattern = st.sampled_from(_PATTERNS).map(lambda text: {"Regex": text}) | st.text(max_size=3).map(
        lambda text: {"String": text}
    )
    replaced = st.tuples(pattern, st.text(max_size=5) | st.sampled_from(["aa" * 50, "a" * 10**6])).map(
        lambda drawn: {"type": "Replace", "pattern": drawn[0], "content": drawn[1]}
    )
    normalizer = st.one_of(
        replaced,
        st.lists(replaced, max_size=6).map(lambda steps: {"type": "Sequence", "normalizers": steps}),
        st.sampled_from(
            [
                {"type": "Prepend", "prepend": "a" * 10**5},
                {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
                {"type": "NFKD"},
            ]
        ),
    )
    split = st.tuples(
        pattern, st.sampled_from(["Isolated", "Removed", "MergedWithNext", "Contiguous"]), st.booleans()
    ).map(lambda drawn: {"type": "Split", "pattern": drawn[0], "behavior": drawn[1], "invert": drawn[2]})
    padded = st.sampled_from(
        [
            {
                "strategy": {"Fixed": 10**9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "x",
            }
        ]
    )
    long_token = st.sampled_from([10, 10**4, 10**6]).map(
        lambda size: [*whole["added_tokens"], whole["added_tokens"][0] | {"id": 2**32 - 1, "content": "x" * size}]
    )
    parts = st.fixed_dictionaries(
        {},
        optional={
            "normalizer": normalizer,
            "pre_tokenizer": split,
            "padding": padded,
            "added_tokens": long_token,
            "decoder": replaced,
        },
    )
    contents = st.one_of(json_text(whole), parts.map(lambda fields: json.dumps(whole | fields).encode()))
    return _inputs("tokenizer.json", "hf/tokenizer.json", contents, (_GENERATE, _EVAL), ("hf", "text.txt"), made)


def _bin(made: Seeds) -> Inputs:
    import torch

    whole = torch.load(io.BytesIO(made.read("bin/pytorch_model.bin")), weights_only=True)
    values = [
        torch.ones(3),
        torch.ones(2, dtype=torch.int8),
        torch.tensor(1.0),
        torch.zeros(2, 2).to_sparse(),
        "text",
        3,
        None,
        [torch.ones(2)],
        {"a": 1},
        print,
        torch.zeros(1).expand(10**9),
    ]

    def file(drawn: tuple[str, Any, Any]) -> bytes:
        out = io.BytesIO()
        name, value, all_of_it = drawn
        torch.save(value if all_of_it else {**whole, name: value}, out)
        return out.getvalue()

    tensors = st.tuples(
        st.sampled_from(list(whole)) | st.text(max_size=5),
        st.sampled_from(values),
        st.sampled_from([False, False, True]),
    )
    contents = st.one_of(damaged(made.read("bin/pytorch_model.bin")), tensors.map(file))
    return _inputs(".bin", "bin/pytorch_model.bin", contents, (("inspect", "bin"),), ("bin",), made)


def _native(made: Seeds) -> Inputs:
    files = [name for name in made.files("native") if not name.endswith("headshare.json")]
    return st.sampled_from(files).flatmap(
        lambda file: _inputs(
            "native files",
            file,
            damaged(made.read(file)),
            (("convert", "native", "out", "--to", "hf"), ("inspect", "native")),
            ("native",),
            made,
        )
    )


def _recipe(made: Seeds) -> Inputs:
    whole = yaml.safe_load(made.read("recipe.yaml"))
    command = ("postshare", "--config", "recipe.yaml", "-o", "run", "--dry-run")
    laughs = (
        "a0: &a0 [x, x]\n"
        + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
        + "data: *a39\n"
    )
    odd_text = st.sampled_from(
        [
            laughs,
            "!!python/object/apply:os.system [ls]",
            "a: &a [*a]",
            "2001-99-99",
            "? [a]\n: b",
            "data: {train: 2026-13-45}",
            "\t",
            "model: !!binary x",
            "<<: 3",
            "- " * 3000,
        ]
    )
    contents = st.one_of(
        changed(whole).map(lambda value: yaml.safe_dump(value, allow_unicode=False).encode(errors="replace")),
        damaged(made.read("recipe.yaml")),
        odd_text.map(str.encode),
    )
    settings = st.tuples(
        st.sampled_from(
            [
                "seed",
                "max_bad_steps",
                "checkpoints.keep",
                "stages.0.steps",
                "data.seq_len",
                "optimizer",
                "mesh.data",
                "batch_size",
                "x.y",
                "stages.9.steps",
                "stages.-1.kind",
                "",
            ]
        ),
        odd(),
    ).map(lambda drawn: f"{drawn[0]}={json.dumps(drawn[1])}")
    seeds = ("recipe.yaml", "hf", "text.txt")
    for seed in seeds:
        made.path(seed)
    by_option = settings.map(lambda change: Input("recipe", (*command, "--set", change), {}, seeds))
    return st.one_of(_inputs("recipe", "recipe.yaml", contents, (command,), seeds, made), by_option)


def _texts(made: Seeds) -> Inputs:
    text = st.one_of(
        damaged(made.read("text.txt")),
        st.binary(max_size=50),
        st.text(max_size=50).map(lambda value: value.encode(errors="replace")),
        st.sampled_from(
            [
                b"",
                b"\xef\xbb\xbf",
                b"\x00" * 1000,
                b"\n" * 100,
                b"a" * 10**6,
                "é".encode("utf-16"),
                b"\xff\xfe" + b"a\x00" * 50,
            ]
        ),
    )
    rows = st.lists(
        changed({"text": "The quick brown fox jumps over the lazy dog", "id": 1}), min_size=1, max_size=4
    ).map(lambda values: "\n".join(map(json.dumps, values)).encode())
    jsonl = st.one_of(rows, damaged(made.read("rows.jsonl")), json_text({"text": "a b c d e f g h i j"}))
    column = st.sampled_from(
        [["a b c"] * 9, [1, 2], [None, None], [["a"]], [b"\xff"], [], [{"a": 1}], ["\x00" * 99], [1.5], [True]]
    )
    parquet = st.one_of(column.map(_parquet), damaged(made.read("rows.parquet")))
    kinds = {"text": (text, "in.txt"), "JSON lines": (jsonl, "in.jsonl"), "parquet": (parquet, "in.parquet")}
    return st.one_of(
        *(
            _inputs(
                kind,
                name,
                contents,
                (("eval", "hf", "--text", name, "--seq-len", "16", "--max-windows", "2"),),
                ("hf",),
                made,
            )
            for kind, (contents, name) in kinds.items()
        )
    )


def _parquet(values: list[Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": values}), out)
    return out.getvalue()


def _sweep(made: Seeds) -> Inputs:
    command = (*SWEEP, "-o", "report", "--resume")
    files = made.files("report/cache")
    json_files = [file for file in files if file.endswith(".json")]
    arrays = [file for file in files if file.endswith(".npz")]
    seeds = ("report", "hf", "text.txt")
    odd_arrays = st.sampled_from(
        [
            np.zeros(0),
            np.zeros((3, 2)),
            np.zeros((99, 2), np.int64),
            np.full((3, 2), np.nan),
            np.array("x"),
            np.zeros((3, 2), np.int64),
            np.full((3, 2), 10**6),
        ]
    )

    def scores(drawn: tuple[str, np.ndarray, bytes]) -> bytes:
        name, array, settings = drawn
        out = io.BytesIO()
        with np.load(io.BytesIO(made.read(arrays[0]))) as stored:
            values = {each: stored[each] for each in stored} | {name: array}
        np.savez(out, **(values | {"settings": np.array(settings.decode(errors="replace"))}))
        return out.getvalue()

    names = st.sampled_from(["donor_layer", "donor_unit", "value", "scores", "drop_score", "scores_x"])
    options = [
        _inputs("sweep folder", file, json_text(json.loads(made.read(file))), (command,), seeds, made)
        for file in json_files
    ]
    if arrays:
        with np.load(io.BytesIO(made.read(arrays[0]))) as stored:
            settings = json.loads(str(stored["settings"]))
        contents = st.one_of(
            damaged(made.read(arrays[0])), st.tuples(names, odd_arrays, json_text(settings)).map(scores)
        )
        # The point is measured again, from these scores.
        options.append(
            contents.map(
                lambda content: Input("scores .npz", (*command, "--ratios", "0.5"), {arrays[0]: content}, seeds)
            )
        )
    return st.one_of(*options)


def _journals(made: Seeds) -> Inputs:
    files = made.files("work")
    return st.sampled_from(files).flatmap(
        lambda file: _inputs(
            "journals",
            file,
            json_text(json.loads(made.read(file))) if file.endswith(".json") else damaged(made.read(file)),
            (WORK,),
            ("work", "hf", "text.txt"),
            made,
        )
    )


_SHARE = ("share", "hf", "out", "--map", "map.json", "--method", "direct")
# Every kind: what makes its inputs, given the seeds.
KINDS: dict[str, Callable[[Seeds], Inputs]] = {
    "config.json": _file("config.json", "hf/config.json", _INSPECT, _INSPECT, _CONVERT, ("plan", "hf", "--topology",
    "v5e:2x2", "--host")),
    "generation_config.json": _file("generation_config.json", "hf/generation_config.json", _INSPECT, _GENERATE),
    "tokenizer.json": _tokenizer,
    "tokenizer_config.json": _file("tokenizer_config.json", "hf/tokenizer_config.json", _GENERATE, (*_GENERATE,
    "--chat"), _EVAL, seeds=("text.txt",)),
    "chat template": _template,
    "safetensors": _safetensors,
    "safetensors index": _file("safetensors index", "sharded/model.safetensors.index.json", ("inspect", "sharded")),
    ".bin": _bin,
    "gguf": _gguf,
    "gguf tokenizer": _gguf_tokenizer,
    "headshare.json": _file("headshare.json", "native/headshare.json", ("inspect", "native"), ("convert", "native",
    "out", "--to", "hf")),
    "native files": _native,
    "compact": _file("compact", "compact/config.json", ("inspect", "compact"), ("convert", "compact", "out", "--to",
    "hf")),
    "compact weights": _bytes("compact weights", "compact/model.safetensors", ("convert", "compact", "out", "--to",
    "native")),
    "map": _file("map", "map.json", _SHARE, seeds=("hf",)),
    "budget map": _file("map", "budget.json", (*_SHARE[:4], "budget.json", "--method", "direct"), seeds=("hf",)),
    "texts": _texts,
    "recipe": _recipe,
    "sweep folder": _sweep,
    "journals": _journals,
    "command line": command_lines,
}  # fmt: skip
