"""A run that release 0.1.0 stopped goes on to the end that it would have had."""

import json
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from support import jax_logits

import headshare_jax as hs
from headshare_jax import cli
from headshare_jax.train import data

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0.1"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())

# The digest of packed text covers the files that transformers makes of a tokenizer.
same_tokenizers = pytest.mark.skipif(
    any(metadata.version(name) != EXPECTED["packages"][name] for name in ("transformers", "tokenizers")),
    reason="another release of transformers may write a tokenizer otherwise",
)


@same_tokenizers
def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(WRITTEN, tmp_path / "written"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HEADSHARE_CACHE", "cache")
    assert cli.run(["postshare", "--config", "run/config.yaml", "--output", "run", "--resume"]) == 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    for line, expected in zip(lines, EXPECTED["run"]["metrics"], strict=True):
        assert (line["step"], line["stage"]) == (expected["step"], expected["stage"])
        # On eight devices sums are in another order than on the one that wrote it.
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    with np.load(WRITTEN / "expected.npz") as arrays:
        logits_bv = arrays["finished_run_logits"]
        found_bv = jax_logits(hs.load(folder / "run" / "final"), arrays["tokens"])[:, -1]
    assert np.abs(found_bv - logits_bv).max() < 1e-4 * np.abs(logits_bv).max()


@same_tokenizers
def test_text_is_packed_into_the_same_blocks(tmp_path: Path) -> None:
    cache = Path(shutil.copytree(WRITTEN / "cache" / "blocks", tmp_path / "blocks"))
    (stored,) = (WRITTEN / "cache" / "blocks").iterdir()
    tokenizer = hs.load_tokenizer(WRITTEN / "dense")
    blocks = data.prepare(str(WRITTEN / "texts" / "train.txt"), tokenizer, seq_len=16, cache=cache)
    assert blocks.digest == stored.name
    tokens, segments = blocks.read(np.arange(len(blocks)))
    assert np.array_equal(tokens, np.load(stored / "tokens.npy"))
    assert np.array_equal(segments, np.load(stored / "segments.npy"))
