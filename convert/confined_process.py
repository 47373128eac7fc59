"""The process that works on what strangers wrote, with little memory and time; `confined` starts it and asks it.

It is run as a script, and imports nothing of this package, which would bring JAX along. A line of JSON is a request,
and is answered by one: `{"value": ...}`, or `{"error": ...}` with what went wrong. Where a limit is met the process
ends, or answers with an error.
"""

import json
import resource
import string
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# What a template may write, and how many times as long as its text what a tokenizer makes of it may be.
MOST_CHARACTERS, MOST_GROWTH = 2**24, 64
# Long runs of letters, digits, marks and spaces: what expressions that try everything take longest for.
PROBE = "".join(f"{letter * 48}!{letter}." for letter in string.printable) + "It's naïve, 東京 🙂 1998:\n\n\t(29)" * 8


def check_tokenizer(path: str) -> None:
    """Loads a `tokenizer.json`, and puts a text through it there and back."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for text in ("", "a", PROBE):
        encoded = tokenizer.encode(text)
        if len(encoded.ids) > MOST_GROWTH * (len(text.encode()) + 1):
            raise ValueError(f"it makes {len(encoded.ids)} tokens of {len(text)} characters")
        decoded = tokenizer.decode(encoded.ids, skip_special_tokens=False)
        if len(decoded) > MOST_GROWTH * (len(text) + 1):
            raise ValueError(f"it gives {len(decoded)} characters back for {len(text)}")


def render(template: str, messages: list[dict[str, str]], special: dict[str, Any]) -> str:
    """A chat as a template writes it, up to where the answer begins."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: str = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=True, **special
    )[0][0]
    if len(rendered) > MOST_CHARACTERS:
        raise ValueError(f"it writes {len(rendered)} characters, more than {MOST_CHARACTERS}")
    return rendered


_TASKS: dict[str, Callable[..., Any]] = {"check_tokenizer": check_tokenizer, "render": render}


def _answer(task: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": _TASKS[task](**request)}
    except MemoryError:
        return {"limit": True}
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        return {"error": str(error) or type(error).__name__}


def _serve(memory: int, seconds: int) -> None:
    # Where a system has no such limit, as macOS, the time in `confined` still holds.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for line in sys.stdin:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds + 1, resource.RLIM_INFINITY))
        print(json.dumps(_answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
