"""Tokenizers and chat templates of strangers: refused in one sentence, or within limits of memory and time."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_cli_model

from headshare_jax import HeadshareError
from headshare_jax.convert import tokenizer


def folder_with(folder: Path, file: str, **fields: Any) -> Path:
    """A tiny tokenizer with other fields in one of its files."""
    path = tiny_cli_model.with_tokenizer(folder) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"pre_tokenizer": split("(a+)+$")}, "retry-limit-in-match over"),
        ({"pre_tokenizer": split("(")}, "unmatched parenthesis"),
        ({"normalizer": replace("a" * 10_000)}, "it makes 10000 tokens of 1 characters"),
        ({"model": {}}, "did not match any variant"),
    ],
    ids=["a regular expression that panics", "no expression", "growth", "no model"],
)
def test_a_hostile_tokenizer_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(HeadshareError, match=f"The tokenizer of .* cannot be used: .*{reason}"):
        tokenizer.load(folder_with(tmp_path, "tokenizer.json", **fields))
    # The tokenizers library tells of its panics there.
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"model_max_length": "abc"},
            "model_max_length in the tokenizer_config.json of .* must be a number, not 'abc'",
        ),
        ({"bos_token": {"a": 1}}, "cannot be read"),
        ({"chat_template": [{"name": "x"}]}, "cannot be read"),
    ],
    ids=str,
)
def test_unusable_settings_of_a_tokenizer_are_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(HeadshareError, match=reason):
        tokenizer.load(folder_with(tmp_path, "tokenizer_config.json", **fields))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10**10 }}", "more than 15 s or 4 GiB"),
        ("{{ 'a' * 10**8 }}", "it writes 100000000 characters"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ raise_exception('no roles') }}", "no roles"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
    ],
    ids=str,
)
def test_a_hostile_template_is_refused(tmp_path: Path, template: str, reason: str) -> None:
    loaded = tokenizer.load(folder_with(tmp_path, "tokenizer_config.json", chat_template=template))
    with pytest.raises(HeadshareError, match=f"The chat template of the tokenizer cannot be used: .*{reason}"):
        tokenizer.chat(loaded, [{"role": "user", "content": "Hello"}])


def test_a_template_writes_what_transformers_makes_it_write(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}\n{{ bos_token }}{{ m.role }}: {{ m['content'] | tojson }}{{ eos_token }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    loaded = tokenizer.load(folder_with(tmp_path, "tokenizer_config.json", chat_template=template))
    messages = [{"role": role, "content": f"ä {role}"} for role in ("system", "user", "assistant", "user")]
    expected = loaded.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat(loaded, messages) == expected


def test_text_that_is_none_is_refused(tmp_path: Path) -> None:
    loaded = tokenizer.load(tiny_cli_model.with_tokenizer(tmp_path))
    with pytest.raises(HeadshareError, match="The text cannot be tokenized"):
        tokenizer.encode(loaded, "\udcff")
