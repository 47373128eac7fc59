"""Reading local files and data sets."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from headshare_jax import HeadshareError
from headshare_jax.convert import text


@given(content=st.text("a é🙂\n\r", max_size=60), piece=st.integers(1, 9))
def test_pieces_of_a_text_file_are_the_file(content: str, piece: int) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(text, "PIECE", piece):
        path = Path(folder) / "words.txt"
        path.write_bytes(content.encode())
        corpus = text.open_corpus(str(path))
        pieces = list(corpus.pieces())
        assert "".join(part.text for part in pieces) == path.read_text()
    assert all(0 < len(part.text) <= 2 * piece for part in pieces)
    assert [part.last for part in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
    assert [part.done for part in pieces] == sorted(part.done for part in pieces)
    assert all(part.done == corpus.size for part in pieces[-1:])


def test_pieces_end_with_a_line_where_they_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE", 10)
    (tmp_path / "words.txt").write_text("a line\n" * 20)
    assert all(part.text.endswith("\n") for part in text.open_corpus(str(tmp_path / "words.txt")).pieces())


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes("Naïve.".encode("utf-8-sig"))
    assert text.read(str(tmp_path / "words.txt")) == "Naïve."


def test_a_corpus_can_be_read_as_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, rows = "Ends with blank lines.\n\n\n\n", ["One.", "", None, "Two \ud83d."]
    read_rows = "One.\n\n\n\n\n\nTwo ?."
    (tmp_path / "words.md").write_text(words)
    assert text.read(str(tmp_path / "words.md")) == words
    lines = "\n\n".join(json.dumps({"body": row, "number": 1}) for row in rows)
    for ending in (".jsonl", ".ndjson", ".json", ".JSONL"):
        (tmp_path / f"rows{ending}").write_text(lines)
        assert text.read(str(tmp_path / f"rows{ending}"), field="body") == read_rows
    columns = {"body": ["One.", "", None, "Two ?."], "number": [1, 2, 3, 4]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    assert text.read(str(tmp_path / "rows.parquet"), field="body") == read_rows
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: datasets.Dataset.from_dict(columns))
    assert text.read("some/set", field="body") == read_rows


def test_the_digest_of_a_data_set_is_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(rows: list[str]) -> str:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: datasets.Dataset.from_dict({"text": rows}))
        return text.open_corpus("some/set").digest()

    assert digest(["a", "b"]) == digest(["a", "b"]) != digest(["a", "c"])


def test_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def file(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    parquet.write_table(pyarrow.table({"number": [1, 2]}), tmp_path / "numbers.parquet")
    good = b'{"text": "words"}\n'
    cases = [
        (str(tmp_path), "text", "is a folder"),
        (file("empty.txt", b" \n"), "text", "is empty"),
        (file("latin.txt", "é".encode("latin-1")), "text", "UTF-8"),
        (file("a.jsonl", good + b"\nnot JSON"), "text", "Line 3 of .*a.jsonl"),
        (file("b.jsonl", good + b'"text"'), "text", "Line 2"),
        (file("c.jsonl", good + b"[" * 10**5), "text", "Line 2"),
        (file("d.jsonl", good + b'{"text": "\xff"}'), "text", "Line 2"),
        (file("e.jsonl", good), "content", "Line 1 of .* field content"),
        (file("f.jsonl", good + b'{"text": ["words"]}'), "text", r"Line 2 of .*\['words'\] in text"),
        (str(tmp_path / "numbers.parquet"), "number", "Row 1 of .* has 1 in number"),
        (str(tmp_path / "numbers.parquet"), "text", r"no column named text \(it has number\)"),
        (file("damaged.parquet", b"PAR1" + bytes(100)), "text", "parquet"),
        ("no/such:set", "text", "neither a file nor a data set"),
        # Names of files, which no hub is asked for.
        ("nope.txt", "text", "There is no file nope.txt"),
        ("no/nope.JSONL", "text", "There is no file no/nope.JSONL"),
        ("nope.parquet", "text", "There is no file nope.parquet"),
        ("./nope", "text", "There is no file ./nope"),
        (str(tmp_path / "nope"), "text", f"There is no file {tmp_path}/nope"),
        ("no/such/text", "text", "There is no file no/such/text"),
    ]
    for spec, field, message in cases:
        with pytest.raises(HeadshareError, match=message):
            text.read(spec, field=field)


def test_a_data_set_without_the_column_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: datasets.Dataset.from_dict({"number": [1]}))
    with pytest.raises(HeadshareError, match=r"some/set has no column named text \(it has number\)"):
        text.open_corpus("some/set")


@pytest.mark.parametrize(("missing", "name"), [("datasets", "some/set"), ("pyarrow", "rows.parquet")])
def test_missing_packages_are_named(missing: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").touch()
    monkeypatch.chdir(tmp_path)
    module: Any = None
    monkeypatch.setitem(sys.modules, missing, module)
    with pytest.raises(HeadshareError, match=r"pip install 'headshare-jax\[eval\]'"):
        text.open_corpus(name)
