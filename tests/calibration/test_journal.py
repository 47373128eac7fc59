"""Journals: work that was stopped goes on where it was, to the same bits, and never on something else's results."""

import dataclasses
import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from equivalent_models import with_params
from support import random_tokens, sharing_by_hand, tiny_model

import headshare_jax as hs
from headshare_jax import parameters
from headshare_jax.convert import journal_folder
from headshare_jax.convert.journal_folder import KEY

WINDOWS = random_tokens((8, 32))
LAYERS = 3


class StopError(Exception):
    """In place of a kill."""


class Noted:
    """Journals that take down what is written to them, and may stop the work there."""

    def __init__(self, journals: hs.JournalFolder, stop_at: int | None = None):
        self.journals, self.stop_at = journals, stop_at
        self.written: list[str] = []

    def of(self, work: str, key: Mapping[str, Any]) -> "Noted":
        self.journal = self.journals.of(work, key)
        return self

    def read(self, step: str) -> dict[str, np.ndarray] | None:
        return self.journal.read(step)

    def write(self, step: str, arrays: Mapping[str, np.ndarray]) -> None:
        if len(self.written) == self.stop_at:
            raise StopError
        self.written.append(step)
        self.journal.write(step, arrays)


def steps(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*/*.safetensors"))


def test_matching_goes_on_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(num_hidden_layers=LAYERS)

    def match(**kwargs: Any) -> hs.MatchResult:
        return hs.match_functional(model, WINDOWS, ties=("qk",), **kwargs)

    expected, journals = match(), hs.JournalFolder(tmp_path / "work")

    def goes_on(layers: list[int]) -> list[int]:
        """Asserts which layers are scored; returns the steps of progress."""
        noted, told = Noted(journals), list[int]()
        same_bits(match(journals=noted, progress=lambda done, total: told.append(done)), expected)
        assert noted.written == [f"layer-{layer}" for layer in layers]
        return told

    with pytest.raises(StopError):
        match(journals=Noted(journals, stop_at=2))
    assert steps(tmp_path / "work") == ["layer-0", "layer-1"]
    assert len(goes_on([2])) == 3 * LAYERS
    # Where all is finished nothing is computed, gradients neither.
    assert goes_on([]) == []
    (damaged,) = tmp_path.glob("work/*/layer-1.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    goes_on([1])
    assert f"{damaged} is damaged" in caplog.text


def same_bits(found: hs.MatchResult, expected: hs.MatchResult) -> None:
    for field in dataclasses.fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "tie_scores":
            assert one.keys() == other.keys() == {"qk"}
            one, other = one["qk"], other["qk"]
        np.testing.assert_array_equal(one, other, strict=isinstance(other, np.ndarray), err_msg=field.name)


@pytest.mark.parametrize(
    ("dtype", "scope", "blocks"), [("float32", "receivers", 2), ("bfloat16", "all", 4)], ids=["float32", "bfloat16"]
)
def test_a_refit_goes_on_where_it_was(tmp_path: Path, dtype: str, scope: str, blocks: int) -> None:
    dense = tiny_model(num_hidden_layers=LAYERS, dtype=dtype)
    shared = hs.share(dense, sharing_by_hand(dense, "qkv", {2: 0}, dropped=[5]))
    # In several batches, of which one would hold both what is fitted to and what is held out.
    settings = hs.RefitSettings(scope=scope, batch_tokens=2 * WINDOWS.shape[1])
    expected, report = hs.refit(dense, shared, WINDOWS, settings)
    assert [fit.drift is None for fit in report.blocks].count(False) > 1
    journals = hs.JournalFolder(tmp_path / "work")
    for finished in range(blocks):
        assert len(steps(tmp_path / "work")) == finished
        noted = Noted(journals, stop_at=1)
        if finished < blocks - 1:
            with pytest.raises(StopError):
                hs.refit(dense, shared, WINDOWS, settings, journals=noted)
        else:
            fitted, again = hs.refit(dense, shared, WINDOWS, settings, journals=noted)
        assert len(noted.written) == 1
    assert again == report
    for name in parameters.parameter_names(dense.config):
        np.testing.assert_array_equal(fitted.array(name), expected.array(name), strict=True)


class Asked:
    """Journals that take down what they are asked for, and go no further."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []

    def of(self, work: str, key: Mapping[str, Any]) -> Any:
        self.keys.append({"work": work, **key})
        raise StopError


def asked(*work: Callable[[Asked], Any]) -> list[dict[str, Any]]:
    """The keys of pieces of work, in their order."""
    journals = Asked()
    for begin in work:
        with pytest.raises(StopError):
            begin(journals)
    return journals.keys


def changed(model: hs.Llama, name: str) -> hs.Llama:
    """The same model but for one value of a parameter, in its last layer if it has layers."""
    value = np.array(getattr(model, name)[...])
    value.flat[-1] += 1
    return with_params(model, **{name: value})


def test_matching_of_something_else_has_another_journal() -> None:
    model = tiny_model(attention_bias=True, mlp_bias=True)
    others = [changed(model, name) for name in parameters.parameter_names(model.config)]
    others.append(tiny_model(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-4))
    same, *keys = asked(
        lambda journals: hs.match_functional(model, np.tile(WINDOWS, (2, 1)), journals=journals),
        lambda journals: hs.match_functional(model, np.tile(WINDOWS, (3, 1)), ties=("qkv",), journals=journals),
        *(lambda journals, other=other: hs.match_functional(other, WINDOWS, journals=journals) for other in others),
        lambda journals: hs.match_functional(model, WINDOWS[::-1], journals=journals),
        lambda journals: hs.match_functional(model, WINDOWS.reshape(-1, 16), journals=journals),
        lambda journals: hs.match_functional(model, WINDOWS, hs.FunctionalSettings(span=1), journals=journals),
        lambda journals: hs.match_functional(model, WINDOWS, ties=("qk",), journals=journals),
    )
    # The search looks at the first eight windows.
    assert keys[0] == same
    assert all_differ(keys)


def test_a_refit_of_something_else_has_another_journal() -> None:
    dense = tiny_model()
    shared, other = (hs.share(dense, sharing_by_hand(dense, "qkv", {2: 0, 5: donor})) for donor in (0, 1))
    in_bfloat16 = with_params(shared, o_pool_phd=shared.o_pool_phd[...].astype("bfloat16"))
    exact = with_params(shared, o_pool_phd=in_bfloat16.o_pool_phd[...].astype("float32"))
    pairs = [
        (dense, shared), (changed(dense, "down_lfd"), shared), (dense, changed(shared, "o_pool_phd")), (dense, other),
        (dense, in_bfloat16), (dense, exact), (dense, hs.share(dense, sharing_by_hand(dense, "qk", {2: 0, 5: 0}))),
    ]  # fmt: skip
    keys = asked(
        *(lambda journals, pair=pair: hs.refit(*pair, WINDOWS, journals=journals) for pair in pairs),
        lambda journals: hs.refit(dense, shared, WINDOWS[::-1], journals=journals),
        lambda journals: hs.refit(dense, shared, WINDOWS, hs.RefitSettings("all"), journals=journals),
    )
    assert all_differ(keys)


def all_differ(keys: list[dict[str, Any]]) -> bool:
    return len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)


def test_a_folder_keeps_bits_and_types_and_journals_apart(tmp_path: Path) -> None:
    journals = hs.JournalFolder(tmp_path / "work")
    one, other = journals.of("match", {"model": "a"}), journals.of("match", {"model": "b"})
    rng = np.random.default_rng(0)
    arrays = {
        np.dtype(dtype).name: rng.normal(size=(2, 3)).astype(dtype)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8)
    }
    one.write("layer-0", arrays)
    assert one.read("layer-1") is other.read("layer-0") is None
    found = hs.JournalFolder(tmp_path / "work").of("match", {"model": "a"}).read("layer-0")
    assert found is not None
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert {json.loads(path.read_text())["model"] for path in tmp_path.glob(f"work/match-*/{KEY}")} == {"a", "b"}


def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *args: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = hs.JournalFolder(tmp_path / "work").of("match", {})
    monkeypatch.setattr(journal_folder, "write_safetensors", full)
    with pytest.raises(hs.HeadshareError, match="the disk is full"):
        journal.write("layer-0", {"drop": np.zeros(2, np.float32)})
    assert [path.name for path in tmp_path.glob("work/*/*")] == [KEY]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "models" / "llama").mkdir(parents=True)
    cases = [("file", "is a file"), ("models", "models/llama is no journal"), ("absent/work", "does not exist")]
    for name, words in cases:
        with pytest.raises(hs.HeadshareError, match=words):
            hs.JournalFolder(tmp_path / name)
