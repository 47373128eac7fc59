"""The cache of packed blocks."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_packing import DOCUMENTS, RecordingTokenizer, byte_tokenizer, everything, json_lines, packed_by_hand

from headshare_jax import HeadshareError
from headshare_jax.convert import storage, text
from headshare_jax.errors import TryAgain
from headshare_jax.train.blocks import Blocks
from headshare_jax.train.data import prepare


def test_a_second_call_does_not_tokenise(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    source = json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS])
    first = prepare(source, tokenizer, seq_len=8, cache=tmp_path / "cache")
    assert tokenizer.seen == list(filter(None, DOCUMENTS))
    tokenizer.seen.clear()
    moved = Path(source).rename(tmp_path / "moved.jsonl")
    second = prepare(str(moved), tokenizer, seq_len=8, workers=2, cache=tmp_path / "cache")
    assert tokenizer.seen == []
    assert second.digest == first.digest
    np.testing.assert_array_equal(everything(second), everything(first))


def test_the_digest_is_of_all_that_makes_the_blocks(tokenizer: RecordingTokenizer, tmp_path: Path) -> None:
    source = json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS])
    as_text = tmp_path / "documents.txt"
    as_text.write_bytes(Path(source).read_bytes())
    other = json_lines(tmp_path / "other.jsonl", [*DOCUMENTS, "more"])
    both = tmp_path / "both.jsonl"
    both.write_text(json.dumps({"text": "twenty characters...", "more": "twenty of the others"}))
    calls: list[tuple[str, RecordingTokenizer, dict[str, Any]]] = [
        (source, tokenizer, {"seq_len": 8}),
        (source, tokenizer, {"seq_len": 9}),
        (source, byte_tokenizer(reverse=True), {"seq_len": 8}),
        (source, byte_tokenizer(None), {"seq_len": 8}),
        (other, tokenizer, {"seq_len": 8}),
        (str(as_text), tokenizer, {"seq_len": 8}),
        (str(both), tokenizer, {"seq_len": 8}),
        (str(both), tokenizer, {"seq_len": 8, "text_field": "more"}),
    ]
    digests = {prepare(path, words, cache=tmp_path / "cache", **how).digest for path, words, how in calls}
    assert len(digests) == len(calls)
    assert folders(tmp_path / "cache") == digests


def test_a_tokenizer_that_was_stored_to_cut_texts_does_not(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=10)
    source = json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS])
    blocks = prepare(source, tokenizer, seq_len=8, cache=tmp_path / "cache")
    np.testing.assert_array_equal(everything(blocks)[0], packed_by_hand(DOCUMENTS, 8)[0])
    assert prepare(source, tokenizer, seq_len=8, cache=tmp_path / "cache").digest == blocks.digest


def test_a_tokenizer_that_was_loaded_offline_is_the_same(tmp_path: Path) -> None:
    source, digests = json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS]), set()
    for offline in (False, True):
        tokenizer = byte_tokenizer()
        tokenizer.init_kwargs["local_files_only"] = offline
        digests.add(prepare(source, tokenizer, seq_len=8, cache=tmp_path / "cache").digest)
    assert len(digests) == 1


def folders(cache: Path) -> set[str]:
    """What is packed in a cache."""
    return {entry.name for entry in cache.iterdir()} - {"known"}


def test_a_text_is_read_for_its_digest_once(
    tokenizer: RecordingTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS]))
    read: list[Path] = []
    monkeypatch.setattr(text, "sha256", lambda path, hashed=text.sha256: read.append(path) or hashed(path))

    def digest() -> str:
        return prepare(str(source), tokenizer, seq_len=8, cache=tmp_path / "cache").digest

    first = digest()
    assert digest() == first
    assert read.count(source) == 1
    os.utime(source, (1, 1))
    assert digest() == first
    assert read.count(source) == 2
    # As long as before, but not the same.
    source.write_text(source.read_text().replace("One", "Two"))
    assert digest() != first
    for known in (tmp_path / "cache" / "known").iterdir():
        known.write_text("text 12")
    assert prepare(str(source), tokenizer, seq_len=8, cache=tmp_path / "cache").digest == digest()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("blocks.packed", lambda path: os.truncate(path, 200)),
        ("blocks.packed", os.unlink),
        ("blocks.json", os.unlink),
        ("blocks.json", lambda path: path.write_text("[]")),
        ("blocks.json", lambda path: path.write_text('{"sha256": "of an older release"}')),
        ("blocks.json", lambda path: os.truncate(path, 5)),
    ],
)
def test_a_cache_that_is_not_whole_is_made_anew(
    name: str, damage: Callable[[Path], Any], tokenizer: RecordingTokenizer, tmp_path: Path
) -> None:
    source, cache = json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS]), tmp_path / "cache"
    blocks = prepare(source, tokenizer, seq_len=8, cache=cache)
    before = everything(blocks)
    damage(blocks.folder / name)
    again = prepare(source, tokenizer, seq_len=8, cache=cache)
    np.testing.assert_array_equal(everything(again), before)
    assert folders(cache) == {blocks.digest}


def test_damage_is_found_as_blocks_are_read_and_mended_by_the_next_start(
    tokenizer: RecordingTokenizer, tmp_path: Path
) -> None:
    source, cache = json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS]), tmp_path / "cache"
    blocks = prepare(source, tokenizer, seq_len=8, cache=cache)
    before = everything(blocks)
    content = bytearray((blocks.folder / "blocks.packed").read_bytes())
    content[-20] ^= 1
    (blocks.folder / "blocks.packed").write_bytes(content)
    damaged = prepare(source, tokenizer, seq_len=8, cache=cache)
    np.testing.assert_array_equal(damaged.read(np.arange(3))[0], before[0][:3])
    with pytest.raises(TryAgain, match=f"Block {len(blocks) - 1} of the packed text in .* made anew at the next start"):
        everything(damaged)
    np.testing.assert_array_equal(everything(prepare(source, tokenizer, seq_len=8, cache=cache)), before)


def test_another_process_may_be_first(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    source, cache = json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS]), tmp_path / "cache"
    others: list[Blocks] = []

    def overtake(done: int, total: int) -> None:
        if not others:
            others.append(prepare(source, tokenizer, seq_len=8, cache=cache))

    blocks = prepare(source, tokenizer, seq_len=8, cache=cache, progress=overtake)
    assert len(tokenizer.seen) == 2 * len(list(filter(None, DOCUMENTS)))
    np.testing.assert_array_equal(everything(blocks), everything(others[0]))
    assert folders(cache) == {blocks.digest}


def test_an_interrupted_call_leaves_nothing(tokenizer: RecordingTokenizer, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    source = json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS])
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tokenizer, seq_len=8, cache=tmp_path / "cache", progress=interrupt)
    assert folders(tmp_path / "cache") == set()


def test_a_cache_in_a_bucket_is_read_by_ranges(tokenizer: RecordingTokenizer, tmp_path: Path, bucket: str) -> None:
    source = json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS])
    here, there = (prepare(source, tokenizer, seq_len=8, cache=cache) for cache in (tmp_path, storage.path(bucket)))
    assert there.digest == here.digest
    numbers = np.array([[2, 0], [1, 2]])
    np.testing.assert_array_equal(there.read(numbers), here.read(numbers))
    tokenizer.seen.clear()
    assert prepare(source, tokenizer, seq_len=8, cache=storage.path(bucket)).digest == here.digest
    assert tokenizer.seen == []
    (there.folder / "blocks.json").unlink()
    np.testing.assert_array_equal(
        everything(prepare(source, tokenizer, seq_len=8, cache=storage.path(bucket))), everything(here)
    )
    assert tokenizer.seen


def test_a_text_in_a_bucket_is_known_by_its_tag(
    tokenizer: RecordingTokenizer, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = storage.path(f"{bucket}/documents.jsonl")
    source.write_text(Path(json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS])).read_text())
    read: list[Path] = []
    monkeypatch.setattr(text, "sha256", lambda path, hashed=text.sha256: read.append(path) or hashed(path))
    digests = [prepare(str(source), tokenizer, seq_len=8, cache=tmp_path / "cache").digest for _ in range(2)]
    assert (
        digests[0]
        == digests[1]
        == prepare(str(tmp_path / "documents.jsonl"), tokenizer, seq_len=8, cache=tmp_path / "cache").digest
    )
    assert read.count(source) == 1
    source.write_text(source.read_text().replace("One", "Two"))
    assert prepare(str(source), tokenizer, seq_len=8, cache=tmp_path / "cache").digest != digests[0]


def test_bad_input_is_refused(tokenizer: RecordingTokenizer, tmp_path: Path) -> None:
    good = json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS])
    tokens = sum(len(document.encode()) + 1 for document in filter(None, DOCUMENTS))
    cases: list[tuple[str, dict[str, Any], str]] = [
        (good, {"seq_len": 1000}, f"documents.jsonl has {tokens} tokens, .* 1000"),
        (good, {"text_field": "content"}, "Line 1 of .* field content"),
        (good, {"cache": Path(good) / "cache"}, "cache"),
        (str(tmp_path), {}, "folder"),
    ]
    for source, changes, message in cases:
        settings: dict[str, Any] = {"seq_len": 8, "cache": tmp_path / "cache"} | changes
        with pytest.raises(HeadshareError, match=message):
            prepare(source, tokenizer, **settings)
    assert not [folder for folder in tmp_path.rglob("*") if folder.name == "blocks.json"]


def test_text_files_need_no_data_sets(
    tokenizer: RecordingTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "words.txt").write_text("just words")
    assert len(prepare(str(tmp_path / "words.txt"), tokenizer, seq_len=4, cache=tmp_path / "cache")) == 2
