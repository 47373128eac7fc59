"""Every command and every example in the documentation and in docstrings runs, and so does the notebook."""

import contextlib
import doctest
import io
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import nbclient
import nbformat
import numpy as np
import pytest
import tiny_cli_model

import headshare_jax as hs
from headshare_jax import cli
from headshare_jax.cli import demo

ROOT = Path(__file__).parents[1]
README, HOME = ROOT / "README.md", ROOT / "docs" / "index.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "The quick brown fox jumps over the lazy dog. " * 300


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(shell: str) -> list[list[str]]:
    """Arguments of every `headshare` command in a shell block."""
    lines = (shlex.split(line, comments=True) for line in shell.replace("\\\n", " ").splitlines())
    return [words[1:] for words in lines if words[:1] == ["headshare"]]


def docstring_examples() -> list[doctest.DocTest]:
    """The public names whose docstrings hold examples, and their methods."""
    finder = doctest.DocTestFinder(exclude_empty=True, recurse=True)
    return [test for name in hs.__all__ for test in finder.find(getattr(hs, name), name) if test.examples]


@contextlib.contextmanager
def as_a_reader_has_it() -> Iterator[None]:
    """JAX's default rules of promotion, which tests make stricter."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documentation's examples start from: the model `my-llama`, and texts."""
    # Ten units, of which a tenth can share.
    tiny_cli_model.saved(tmp_path / "my-llama", num_hidden_layers=5)
    for name in ("text.txt", "train.txt", "held-out.txt"):
        (tmp_path / name).write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    # What is said to `chat`.
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    monkeypatch.setenv("HEADSHARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "smollm2", lambda: tmp_path / "my-llama")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if page != HOME and blocks(page)], ids=lambda page: page.stem)
def test_commands_and_examples_run(page: Path, workplace: Path) -> None:
    for language, content in blocks(page):
        if language == "yaml":
            (workplace / "recipe.yaml").write_text(content)
        elif language == "sh":
            for args in commands(content):
                assert cli.run(args) == 0, shlex.join(args)
        elif language == "python":
            with as_a_reader_has_it():
                exec(compile(content, str(page), "exec"), {})


def test_the_sites_first_page_shows_the_readmes_example() -> None:
    assert [block for block in blocks(README) if block[0] == "python"] == blocks(HOME)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the reference says that its examples start from."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_cli_model.saved(folder / "my-llama")
    (folder / "text.txt").write_text(TEXT)
    model, tokenizer = hs.load(folder / "my-llama"), hs.load_tokenizer(folder / "my-llama")
    tokens = tokenizer(TEXT[:1024]).input_ids
    windows = hs.calibration_windows(tokens, 12, 64, model.config.vocab_size)
    sharing = hs.sharing_map(hs.match(model, "qk"), ratio=0.4)
    return {
        **{"hs": hs, "np": np, "json": json, "Path": Path, "folder": folder},
        **{"model": model, "tokenizer": tokenizer, "tokens": tokens, "windows": windows, "sharing": sharing},
        "shared": hs.share(model, sharing),
        "scores": hs.match_functional(model, windows),
    }


@pytest.mark.parametrize("example", docstring_examples(), ids=lambda example: example.name)
def test_examples_of_docstrings(
    example: doctest.DocTest, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(names["folder"])
    example.globs = dict(names)
    told: list[str] = []
    with as_a_reader_has_it():
        result = doctest.DocTestRunner().run(example, out=told.append)
    assert result.failed == 0, "".join(told)


def test_every_public_function_has_an_example() -> None:
    shown = {example.name for example in docstring_examples()}
    functions = {name for name in hs.__all__ if not isinstance(getattr(hs, name), type)}
    assert functions <= shown


def test_the_reference_shows_every_public_name() -> None:
    shown = re.findall(r"^::: headshare_jax\.(\w+)$", (ROOT / "docs/reference/index.md").read_text(), re.MULTILINE)
    assert set(shown) == set(hs.__all__)


def test_the_notebook_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSHARE_MODEL", str(workplace / "my-llama"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(workplace)}}).execute()
    assert (workplace / "smaller").is_dir()


def test_every_command_is_shown() -> None:
    shell = [content for page in PAGES for language, content in blocks(page) if language == "sh"]
    assert {args[0] for content in shell for args in commands(content)} == set(cli.COMMANDS)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in (README, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"^make (\w+)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
