"""Inputs of every kind: files of strangers with a command that reads them, and command lines."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st

from fuzz import gguf_file
from fuzz.command_lines import command_lines
from fuzz.files import Inputs, in_bytes, in_file, in_json
from fuzz.mutate import changed, damaged, json_text, odd
from fuzz.oracle import Input
from fuzz.seeds import EVAL, GENERATE, SWEEP, WORK, Seeds
from fuzz.tokenizer_inputs import gguf_tokenizers, templates, tokenizers

_INSPECT = ("inspect", "hf")
_CONVERT = ("convert", "hf", "out", "--to", "native")


def _safetensors(made: Seeds) -> Inputs:
    content = made.read("hf/model.safetensors")
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])

    def file(parts: tuple[bytes, int | None]) -> bytes:
        text, length = parts
        return (len(text) if length is None else length % 2**64).to_bytes(8, "little") + text + content[8 + size :]

    lengths = st.sampled_from([None, None, None, None, 0, 2**31, 2**63, 2**64 - 1, 100_000_000])
    contents = st.one_of(st.tuples(json_text(header), lengths).map(file), damaged(content))
    return in_file("safetensors", "hf/model.safetensors", contents, (_INSPECT, _CONVERT), ("hf",), made)


def _gguf(made: Seeds) -> Inputs:
    return st.one_of(*(_one_gguf(made, name) for name in ("model.gguf", "pruned.gguf")))


def _one_gguf(made: Seeds, name: str) -> Inputs:
    header, rest = gguf_file.parsed(made.read(name))
    settings = {**header, "pairs": [pair for pair in header["pairs"] if not isinstance(pair["value"], dict)]}
    contents = st.one_of(
        changed(header).map(lambda value: gguf_file.written(value, rest)),
        # Of the settings alone, among which others are not drowned by the tokenizer.
        changed(settings).map(lambda value: gguf_file.written(value, rest)),
        damaged(made.read(name)[:20_000]),
    )
    return in_file("gguf", name, contents, (("inspect", name), ("convert", name, "out", "--to", "hf")), (name,), made)


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
    return in_file(".bin", "bin/pytorch_model.bin", contents, (("inspect", "bin"),), ("bin",), made)


def _native(made: Seeds) -> Inputs:
    files = [name for name in made.files("native") if not name.endswith("headshare.json")]
    return st.sampled_from(files).flatmap(
        lambda file: in_file(
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
    return st.one_of(in_file("recipe", "recipe.yaml", contents, (command,), seeds, made), by_option)


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
            in_file(
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
        in_file("sweep folder", file, json_text(json.loads(made.read(file))), (command,), seeds, made)
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
        lambda file: in_file(
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
    "config.json": in_json("config.json", "hf/config.json", _INSPECT, _INSPECT, _CONVERT, ("plan", "hf", "--topology",
    "v5e:2x2", "--host")),
    "generation_config.json": in_json("generation_config.json", "hf/generation_config.json", _INSPECT, GENERATE),
    "tokenizer.json": tokenizers,
    "tokenizer_config.json": in_json("tokenizer_config.json", "hf/tokenizer_config.json", GENERATE, (*GENERATE,
    "--chat"), EVAL, seeds=("text.txt",)),
    "chat template": templates,
    "safetensors": _safetensors,
    "safetensors index": in_json("safetensors index", "sharded/model.safetensors.index.json", ("inspect", "sharded")),
    ".bin": _bin,
    "gguf": _gguf,
    "gguf tokenizer": gguf_tokenizers,
    "headshare.json": in_json("headshare.json", "native/headshare.json", ("inspect", "native"), ("convert", "native",
    "out", "--to", "hf")),
    "native files": _native,
    "compact": in_json("compact", "compact/config.json", ("inspect", "compact"), ("convert", "compact", "out", "--to",
    "hf")),
    "compact weights": in_bytes("compact weights", "compact/model.safetensors", ("convert", "compact", "out", "--to",
    "native")),
    "map": in_json("map", "map.json", _SHARE, seeds=("hf",)),
    "budget map": in_json("map", "budget.json", (*_SHARE[:4], "budget.json", "--method", "direct"), seeds=("hf",)),
    "texts": _texts,
    "recipe": _recipe,
    "sweep folder": _sweep,
    "journals": _journals,
    "command line": command_lines,
}  # fmt: skip
