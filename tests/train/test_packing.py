"""Documents packed into blocks."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from support_packing import DOCUMENTS, EOS, RecordingTokenizer, byte_tokenizer, everything, json_lines, packed_by_hand

from headshare_jax import HeadshareError
from headshare_jax.convert import text
from headshare_jax.train import packing
from headshare_jax.train.blocks import Blocks
from headshare_jax.train.data import prepare


@given(
    documents=st.lists(st.text("ab é\n", max_size=20), min_size=1, max_size=12),
    seq_len=st.integers(1, 12),
    batch_characters=st.integers(1, 40),
    workers=st.integers(1, 3),
    eos=st.sampled_from([EOS, None]),
)
def test_blocks_hold_the_documents(
    documents: list[str], seq_len: int, batch_characters: int, workers: int, eos: str | None
) -> None:
    tokens, segments = packed_by_hand(documents, seq_len, eos)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(packing, "_BATCH_CHARACTERS", batch_characters):
        source = json_lines(Path(folder) / "documents.jsonl", [*documents, None])

        def blocks() -> Blocks:
            return prepare(source, byte_tokenizer(eos), seq_len=seq_len, workers=workers, cache=Path(folder) / "cache")

        if not len(tokens):
            with pytest.raises(HeadshareError, match=rf"seq_len {seq_len};"):
                blocks()
            return
        result = blocks()
        for found, expected in zip(everything(result), (tokens, segments), strict=True):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == np.int32


def test_a_text_file_is_one_document(
    tokenizer: RecordingTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "\n\n".join(DOCUMENTS) * 3
    (tmp_path / "words.txt").write_text(words)
    monkeypatch.setattr(text, "PIECE", 16)
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 50)
    blocks = prepare(str(tmp_path / "words.txt"), tokenizer, seq_len=1, workers=2, cache=tmp_path / "cache")
    tokens, segments = everything(blocks)
    assert tokenizer.decode(tokens.ravel().tolist()) == words + EOS
    assert (segments == 1).all()


def test_blocks_are_read_in_any_order_and_shape(tokenizer: RecordingTokenizer, tmp_path: Path) -> None:
    source = json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS])
    blocks = prepare(source, tokenizer, seq_len=8, cache=tmp_path / "cache")
    numbers = np.array([[3, 0, 3], [1, 2, 0]])
    for found, whole in zip(blocks.read(numbers), everything(blocks), strict=True):
        np.testing.assert_array_equal(found, whole[numbers])
    assert blocks.read(numbers[:, :0])[0].shape == (2, 0, 8)


@pytest.mark.parametrize(("vocabulary", "most"), [(2**16, 2.2), (2**16 + 1, 4.2)])
def test_a_token_takes_few_bytes(vocabulary: int, most: float, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(vocabulary - len(tokenizer))])
    last = f"<{vocabulary - 258}>"
    source = json_lines(tmp_path / "documents.jsonl", ["x" * 4000, last * 500])
    blocks = prepare(source, tokenizer, seq_len=256, cache=tmp_path / "cache")
    assert everything(blocks)[0].max() == vocabulary - 1
    stored = sum(file.stat().st_size for file in blocks.folder.glob("*.packed"))
    assert stored <= most * 256 * len(blocks)


def of_jsonl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return json_lines(folder / "documents.jsonl", [*DOCUMENTS, None], "content")


def of_parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    table = pyarrow.table({"number": range(len(DOCUMENTS) + 1), "content": [*DOCUMENTS, None]})
    parquet.write_table(table, folder / "documents.parquet", row_group_size=2)
    return str(folder / "documents.parquet")


def of_data_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        assert (name, config, split) == ("some/set", "raw", "train")
        return datasets.Dataset.from_dict({"number": range(len(DOCUMENTS) + 1), "content": [*DOCUMENTS, None]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return "some/set:raw"


def of_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    rows = of_jsonl(folder, monkeypatch)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "copies"))
    builder = datasets.load_dataset_builder("json", data_files={"train": rows})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: builder)
    return "some/set:raw"


def test_a_stream_keeps_no_copy(tokenizer: RecordingTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared() -> Blocks:
        return prepare(source, tokenizer, seq_len=6, text_field="content", streaming=True, cache=tmp_path / "cache")

    source = of_stream(tmp_path, monkeypatch)
    blocks = prepared()
    np.testing.assert_array_equal(everything(blocks), packed_by_hand(DOCUMENTS, 6))
    assert not [file for file in tmp_path.rglob("*") if file.suffix == ".arrow"]
    # A second start reads no row.
    monkeypatch.setattr(datasets.IterableDataset, "iter", None)
    assert prepared().digest == blocks.digest


@pytest.mark.parametrize("make", [of_jsonl, of_parquet, of_data_set])
def test_rows_are_documents(
    make: Callable[[Path, pytest.MonkeyPatch], str],
    tokenizer: RecordingTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 20)
    blocks = prepare(
        make(tmp_path, monkeypatch),
        tokenizer,
        seq_len=6,
        text_field="content",
        cache=tmp_path / "cache",
        progress=lambda done, total: seen.append((done, total)),
    )
    tokens, segments = packed_by_hand(DOCUMENTS, 6)
    np.testing.assert_array_equal(everything(blocks), (tokens, segments))
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_workers_are_all_the_threads_there_are(
    tokenizer: RecordingTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 10)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "before")
    prepare(
        json_lines(tmp_path / "documents.jsonl", [*DOCUMENTS]),
        tokenizer,
        seq_len=4,
        cache=tmp_path / "cache",
        progress=lambda done, total: seen.add(os.environ["TOKENIZERS_PARALLELISM"]),
    )
    assert seen == {"false"}
    assert os.environ["TOKENIZERS_PARALLELISM"] == "before"
