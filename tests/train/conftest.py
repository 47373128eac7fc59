"""A workplace for runs, and a run that was never interrupted, which several files compare with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_cli_model
from postshare_run import TEXT, recipe
from support_packing import RecordingTokenizer, byte_tokenizer

from headshare_jax.train import loop, metrics


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, a text to train on, one to evaluate on, and a cache."""
    folder = tmp_path_factory.mktemp("postshare")
    tiny_cli_model.saved(folder / "model")
    (folder / "train.txt").write_text(TEXT)
    (folder / "held-out.txt").write_text("The lazy dog sleeps, and the fox jumps.\n" * 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADSHARE_CACHE", str(folder / "cache"))
        # The machine's speed is measured in every run, and of no matter here.
        patch.setattr(metrics, "_RATE_SIZE", 256)
        yield folder


@pytest.fixture(scope="session")
def finished(workplace: Path) -> Path:
    """A run of both stages, never interrupted."""
    loop.run(recipe(workplace), workplace / "whole")
    return workplace / "whole"


@pytest.fixture(scope="module")
def tokenizer() -> RecordingTokenizer:
    return byte_tokenizer()
