"""Inputs that went wrong once, each with the exit code and the words that are right."""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from fuzz.oracle import Input
from fuzz.seeds import CHAT_TEMPLATE, EVAL, GENERATE, SWEEP, WRITTEN


@dataclass(frozen=True)
class Case:
    """An input, and what must come of it.

    Attributes:
      given: the input.
      code: its exit code.
      words: part of what is said.
    """

    given: Input
    code: int
    words: str


def _fields(name: str, file: str, **fields: Any) -> dict[str, bytes]:
    """A file of the model with other fields."""
    there = json.loads((WRITTEN / "dense-hf" / file).read_text())
    return {f"{name}/{file}": json.dumps(there | fields).encode()}


def _template(template: str) -> dict[str, bytes]:
    return _fields("hf", "tokenizer_config.json", chat_template=template)


def _refused(kind: str, words: str, args: tuple[str, ...], files: dict[str, bytes], *seeds: str, code: int = 2) -> Case:
    return Case(Input(kind, args, files, seeds or ("hf", "text.txt")), code, words)


def _chat(template: str, words: str) -> Case:
    return _refused("chat template", words, (*GENERATE, "--chat"), _template(template))


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _scores() -> bytes:
    out = io.BytesIO()
    np.savez(out, value=np.zeros(3), settings=np.array("{}"))
    return out.getvalue()


_LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)) + "data: *a59\n"
_LAUGHS_IN_A_FIELD = "model:\n- &a0 [x]\n" + "".join(f"- &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
POSTSHARE = ("postshare", "--config", "recipe.yaml", "-o", "run", "--dry-run")

NAMED: list[Case] = [
    _chat("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    _chat("{{ 'a' * 10**10 }}", "more than 15 s or 4 GiB"),
    _chat("{{ raise_exception('[/x] no') }}", "[/x] no"),
    _chat("{% if %}", "cannot be used"),
    _chat("{{ messages[7].content }}", "cannot be used"),
    _refused(
        "tokenizer.json", "retry-limit", GENERATE, _fields("hf", "tokenizer.json", pre_tokenizer=_split("(a+)+$"))
    ),
    _refused("tokenizer.json", "unmatched", GENERATE, _fields("hf", "tokenizer.json", pre_tokenizer=_split("("))),
    _refused(
        "tokenizer_config.json",
        "model_max_length",
        GENERATE,
        _fields("hf", "tokenizer_config.json", model_max_length="abc"),
    ),
    _refused("config.json", "eos_token_id", ("inspect", "hf"), _fields("hf", "config.json", eos_token_id=10**12)),
    _refused(
        "generation_config.json",
        "eos_token_id",
        ("inspect", "hf"),
        _fields("hf", "generation_config.json", eos_token_id=10**12),
    ),
    _refused("recipe", "unknown key", POSTSHARE, {"recipe.yaml": _LAUGHS.encode()}),
    _refused("recipe", "must be a valid string", POSTSHARE, {"recipe.yaml": _LAUGHS_IN_A_FIELD.encode()}),
    _refused("recipe", "not readable YAML", POSTSHARE, {"recipe.yaml": b"!!python/object/apply:os.system [ls]"}),
    _refused("sweep folder", "delete", (*SWEEP, "-o", "report", "--resume"), {"report/cache/identity.json": b"[]"}),
    _refused("command line", "max", (*GENERATE[:-1], "1" + "0" * 30), {}),
    _refused("command line", "headshare", (*GENERATE[:2], "--prompt", "\udcff"), {}),
    _refused("command line", "headshare", (*GENERATE[:2], "--prompt", "a" * 80_000), {}),
    _refused("command line", "file", ("eval", "hf", "--text", "train[/x].txt"), {}),
    _refused(
        "safetensors index",
        "shard",
        ("inspect", "sharded"),
        {"sharded/model.safetensors.index.json": json.dumps({"weight_map": {"a": "x" * 5000}}).encode()},
        "sharded",
    ),
    Case(Input("chat template", (*GENERATE, "--chat"), _template(CHAT_TEMPLATE), ("hf",)), 0, ""),
    Case(Input("command line", EVAL, {}, ("hf", "text.txt")), 0, ""),
]
# These take the time that they are allowed.
SLOW: list[Case] = [
    _chat("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "more than 15 s"),
    _chat(
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "more than 15 s"
    ),
]
