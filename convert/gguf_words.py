"""How byte-level tokenizers cut text into words before they merge: the rules by the names that llama.cpp gives them."""

import json
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _split(pattern: str) -> PreTokenizer:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2 = ByteLevel(add_prefix_space=False, use_regex=True)
_LLAMA3 = _split(_SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _MARKS + _SPACES)
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_QWEN2_NAMES = ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "hunyuan", "solar-open", "grok-2")

# The first name of a rule is the one that is written.
RULES: dict[str, PreTokenizer] = {
    **dict.fromkeys(("gpt-2", "default", "phi-2", "olmo", "mpt", "exaone4", "trillion", "granite-docling"), _GPT2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        Sequence([Digits(individual_digits=True), _GPT2]),
    ),
    **dict.fromkeys((*_LLAMA3_NAMES, "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(_QWEN2_NAMES, _split(_SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _MARKS + _SPACES)),
    "qwen35": _split(
        _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES,
    ),
    "tekken": _split("".join(_CASED) + r"|\p{N}" + _CASED_MARKS + _SPACES),
    **dict.fromkeys(
        ("gpt-4o", "llama4", "kanana2"),
        _split("".join(f"{word}{_SUFFIXES}?" for word in _CASED) + r"|\p{N}{1,3}" + _CASED_MARKS + _SPACES),
    ),
}
# These look a whole word up before they merge, and begin with the first token unless told otherwise.
WHOLE_WORDS = (*_LLAMA3_NAMES, "tekken")
# Their tokenizers compose accents with letters first.
COMPOSED = ("qwen2", "qwen35")


def name_of(pre_tokenizer: dict[str, Any], whole_words: bool) -> str | None:
    """The name of a rule given as in `tokenizer.json`, if llama.cpp knows it.

    Args:
      pre_tokenizer: the rule.
      whole_words: whether a word that is a token is taken whole; decides between names of the same rule.
    """
    steps = _steps(pre_tokenizer)
    names = [name for name, rule in RULES.items() if _steps(json.loads(rule.__getstate__())) == steps]
    return min(names, key=lambda name: (name in WHOLE_WORDS) != whole_words, default=None)


def _steps(rule: dict[str, Any]) -> list[Any]:
    """A rule's steps, without what decides on offsets only."""
    match rule:
        case {"type": "Sequence", "pretokenizers": [*rules]}:
            return [step for rule in rules for step in _steps(rule)]
        # A rule whose pattern matches all of a text keeps it all, however the split is said.
        case {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}:
            return [pattern]
        case {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": True}:
            return [pattern]
    return [{key: value for key, value in rule.items() if key != "trim_offsets"}]
