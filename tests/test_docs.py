"""Every command and every Python example in the documentation runs."""

import re
import shlex
from pathlib import Path

import jax
import pytest
import tiny_cli_model

from headshare_jax import cli
from headshare_jax.cli import demo

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Arguments of every `headshare` command in the page's shell blocks, in order."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [words[1:] for words in lines if words[:1] == ["headshare"]]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documentation's examples start from: the model `my-llama`, and texts."""
    tiny_cli_model.saved(tmp_path / "my-llama")
    for name in ("text.txt", "train.txt", "held-out.txt"):
        (tmp_path / name).write_text("The quick brown fox jumps over the lazy dog. " * 120)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADSHARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "smollm2", lambda: tmp_path / "my-llama")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_examples_run(page: Path, workplace: Path) -> None:
    for number, recipe in enumerate(blocks(page, "yaml")):
        (workplace / f"recipe{number or ''}.yaml").write_text(recipe)
    for args in commands(page):
        assert cli.run(args) == 0, shlex.join(args)
    # A reader has JAX's default rules of promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for example in blocks(page, "python"):
            exec(compile(example, str(page), "exec"), {})


def test_readme_shows_the_main_commands() -> None:
    shown = {args[0] for page in PAGES for args in commands(page)}
    assert shown == set(cli.COMMANDS)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks(ROOT / "README.md", "sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
