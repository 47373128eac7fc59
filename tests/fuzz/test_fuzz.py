"""Whatever is in a file or on a command line: it is done, or refused in one sentence. `make fuzz` tries for longer."""

import shutil
import uuid
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fuzz.inputs import KINDS
from fuzz.named import NAMED, Case
from fuzz.oracle import Input, Outcome, try_input
from fuzz.seeds import Seeds

# Inputs of each kind; those that compile programs or whose seeds take long are left to `make fuzz`.
EXAMPLES = {
    "config.json": 25,
    "tokenizer.json": 6,
    "safetensors": 25,
    "safetensors index": 15,
    ".bin": 10,
    "gguf": 30,
    "headshare.json": 6,
    "compact": 15,
    "map": 6,
    "command line": 8,
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    return Seeds(tmp_path_factory.mktemp("fuzz") / "seeds")


def tried(given: Input, seeds: Seeds) -> Outcome:
    for name in given.seeds:
        seeds.path(name)
    folder = seeds.folder.parent / uuid.uuid4().hex
    try:
        return try_input(given, seeds.folder, folder / "in")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("PIP_NO_INDEX", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HEADSHARE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("case", NAMED, ids=lambda case: f"{case.given.kind}: {case.words}")
def test_what_went_wrong_once(seeds: Seeds, case: Case) -> None:
    outcome = tried(case.given, seeds)
    assert outcome.problem is None, outcome.said
    assert outcome.code == case.code, outcome.said
    assert case.words in outcome.said


@pytest.mark.parametrize("kind", EXAMPLES)
def test_any_input_is_used_or_refused(seeds: Seeds, kind: str, tmp_path: Path) -> None:
    failures = []

    @settings(max_examples=EXAMPLES[kind], phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @hypothesis.seed(0)
    @given(drawn=KINDS[kind](seeds))
    def try_all(drawn: Input) -> None:
        outcome = tried(drawn, seeds)
        if outcome.problem is not None:
            blob = tmp_path / f"{len(failures)}.json"
            blob.write_text(drawn.to_json())
            failures.append(f"{outcome.problem}: {outcome.said}; repeat it: python tests/fuzz/long.py --repeat {blob}")

    try_all()
    assert not failures, "\n".join(failures)
