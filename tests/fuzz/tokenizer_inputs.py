"""Tokenizers and chat templates: expressions, growth and loops without end, in the fields that take them."""

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from fuzz import gguf_file
from fuzz.files import Inputs, in_file
from fuzz.mutate import changed, json_text
from fuzz.seeds import EVAL, GENERATE, Seeds


def gguf_tokenizers(made: Seeds) -> Inputs:
    header, rest = gguf_file.parsed(made.read("model.gguf"))
    words = [pair for pair in header["pairs"] if pair["key"].startswith("tokenizer.")]
    others = [pair for pair in header["pairs"] if pair not in words]
    kinds = {"gpt2": {}, "llama": {"scores": {"item": 6, "values": [0.5] * 259}}}
    contents = st.tuples(changed(words), st.sampled_from(list(kinds))).map(
        lambda drawn: gguf_file.written({**header, "pairs": others + _with(drawn[0], drawn[1], kinds[drawn[1]])}, rest)
    )
    commands = (("generate", "model.gguf", "--prompt", "a b", "--max-new-tokens", "1"),)
    return in_file("gguf tokenizer", "model.gguf", contents, commands, ("model.gguf",), made)


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


def templates(made: Seeds) -> Inputs:
    settings = json.loads(made.read("hf/tokenizer_config.json"))
    block = st.one_of(st.sampled_from(_BLOCKS), st.text(max_size=10))
    template = st.recursive(
        block,
        lambda inner: st.tuples(st.sampled_from(_AROUND), inner).map(lambda drawn: drawn[0].replace("@", drawn[1])),
        max_leaves=3,
    )
    contents = template.map(lambda text: json.dumps(settings | {"chat_template": text}).encode())
    commands = ((*GENERATE, "--chat"),)
    return in_file("chat template", "hf/tokenizer_config.json", contents, commands, ("hf",), made)


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


def tokenizers(made: Seeds) -> Inputs:
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
    return in_file("tokenizer.json", "hf/tokenizer.json", contents, (GENERATE, EVAL), ("hf", "text.txt"), made)
