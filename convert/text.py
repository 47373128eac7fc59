"""Text to measure with and to train on: local files and data sets."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from headshare_jax.convert import storage
from headshare_jax.convert.hub import is_unreached
from headshare_jax.errors import HeadshareError, TryAgain, explained

# Characters of a text file that are in memory at a time.
PIECE = 2**18
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_FILE_ENDINGS = (*_JSON_LINES, ".parquet", ".txt", ".md")
_DATA_SET_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_ROWS = 1024


class Piece(NamedTuple):
    """Some text of a document.

    Attributes:
      text: it follows directly on the piece before, if that was not its document's last.
      last: the document ends here.
      done: how much of the corpus has been read, in the unit of its size.
    """

    text: str
    last: bool
    done: int


@dataclass(frozen=True)
class Corpus:
    """Documents that are read one after another, as often as wanted, a little at a time.

    Attributes:
      size: bytes of a text or JSONL file, rows of a parquet file or data set; 0 for rows that are not counted.
      digest: gives a key of the content and of how it is read; a file is read for it.
      pieces: gives the documents from the first on; raises HeadshareError where they cannot be read.
      version: tells a file's content from others without reading it; None where the digest does.
    """

    size: int
    digest: Callable[[], str]
    pieces: Callable[[], Iterator[Piece]]
    version: str | None = None


def read(spec: str, *, field: str = "text") -> str:
    """A whole corpus as one text, documents joined by blank lines.

    Args:
      spec, field: as for `open_corpus`, but with the split `test` by default.

    Raises:
      HeadshareError: nothing there, not text, or an empty text.
    """
    pieces = open_corpus(spec, field=field, split="test").pieces()
    text = "".join(piece.text + "\n\n" * piece.last for piece in pieces).removesuffix("\n\n")
    if not text.strip():
        raise HeadshareError(f"The text {spec} is empty; give one with words in it.")
    return text


def open_corpus(spec: str, *, field: str = "text", split: str = "train", streaming: bool = False) -> Corpus:
    """Opens a local file or a data set.

    Args:
      spec: path of a JSONL (.jsonl, .ndjson, .json) or parquet (.parquet) file, whose rows are the documents; of any
        other UTF-8 text file (a byte-order mark is left out), which is one document; or `name[:config[:split]]` of a
        data set, whose rows are.
      field: field or column that holds the text of a row; a null there is an empty document.
      split: of a data set whose name has none.
      streaming: a data set is read as it comes, and no copy is kept on this machine.

    Raises:
      HeadshareError: nothing there, or not readable, or without that column.
    """
    check_name(spec)
    path = storage.path(spec)
    if not path.exists():
        return _data_set(spec, field, split, streaming)
    ending, size = path.suffix.lower(), storage.size(path)
    if ending == ".parquet":
        kind, size, pieces = "parquet", *_parquet(path, field)
    elif ending in _JSON_LINES:
        kind, pieces = "json", lambda: _json_lines(path, field)
    else:
        kind, pieces = "text", lambda: _text_file(path)
    return Corpus(size, lambda: f"{kind} {sha256(path)}", pieces, f"{kind} {storage.version(path)}")


def check_name(spec: str) -> None:
    """Raises HeadshareError unless a name is a file's that can be opened, or may be a data set's."""
    path = storage.path(spec)
    try:
        with storage.reached(path):
            if path.is_file():
                path.open("rb").close()
                return
        if path.exists():
            what = "a folder" if path.is_dir() else "no file, but a device or a pipe"
            raise HeadshareError(f"{path} is {what}; give a text file.")
    except HeadshareError:
        raise
    except OSError as error:
        raise HeadshareError(explained(error)) from error
    # Whoever misspells a file is told at once, not after attempts to reach a hub.
    if path.suffix.lower() in _FILE_ENDINGS or not _DATA_SET_NAME.fullmatch(spec.partition(":")[0]):
        raise HeadshareError(f"There is no file {spec}; check its name and folder.")


def has_fields(spec: str) -> bool:
    """Whether what a name stands for has rows of fields, and is not a plain text file."""
    path = storage.path(spec)
    return not path.exists() or path.suffix.lower() in (*_JSON_LINES, ".parquet")


def _text_file(path: Path) -> Iterator[Piece]:
    with _reading(path, "UTF-8 text"), path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
        text = _lines(file)
        while text:
            following = _lines(file)
            yield Piece(text, not following, raw.tell())
            text = following


def _lines(file: io.TextIOWrapper) -> str:
    """About `PIECE` characters, up to a line's end unless the line is as long again; tokens rarely reach across one."""
    return file.read(PIECE) + file.readline(PIECE)


def _json_lines(path: Path, field: str) -> Iterator[Piece]:
    done = 0
    with _reading(path, "JSON lines"), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            done += len(line)
            if not line.strip():
                continue
            try:
                value = json.loads(line)[field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise HeadshareError(f"Line {number} of {path} is not a JSON object with a field {field}.") from error
            yield Piece(_text(value, f"Line {number} of {path}", field), True, done)


def _parquet(path: Path, field: str) -> tuple[int, Callable[[], Iterator[Piece]]]:
    """The number of rows, and the documents."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise HeadshareError(_needs_datasets(f"To read {path}")) from error
    with _reading(path, "parquet"), path.open("rb") as raw, parquet.ParquetFile(raw) as file:
        _check_column(field, file.schema_arrow.names, str(path))
        size = file.metadata.num_rows

    def pieces() -> Iterator[Piece]:
        with _reading(path, "parquet"), path.open("rb") as raw, parquet.ParquetFile(raw) as file:
            batches = file.iter_batches(_ROWS, columns=[field])
            yield from _rows((batch.column(0).to_pylist() for batch in batches), str(path), field)

    return size, pieces


def _data_set(spec: str, field: str, split: str, streaming: bool) -> Corpus:
    try:
        import datasets
    except ImportError as error:
        raise HeadshareError(_needs_datasets(f"{spec} is not a file; to read it as a data set")) from error
    name, config, own_split = [*spec.split(":"), "", ""][:3]
    split = own_split or split
    with _loading(f"{spec} is neither a file nor a data set that can be loaded"):
        if streaming:
            builder = datasets.load_dataset_builder(name, config or None)
            data = builder.as_streaming_dataset(split=split)
            size, digest = _streamed(builder, split)
        else:
            data = datasets.load_dataset(name, config or None, split=split)
            size, digest = len(data), f"data set {data._fingerprint}"
    _check_column(field, data.column_names, f"The data set {spec}")
    column = data.select_columns([field])

    def pieces() -> Iterator[Piece]:
        with _loading(f"The data set {spec} cannot be read"):
            yield from _rows((batch[field] for batch in column.iter(_ROWS)), f"the data set {spec}", field)

    return Corpus(size, lambda: digest, pieces)


def _streamed(builder: Any, split: str) -> tuple[int, str]:
    """Rows of a data set that is not copied, 0 where they are not counted, and a key: its files and their versions."""
    files = builder.config.data_files[split]
    key = hashlib.sha256(json.dumps([builder.hash, list(files), files.origin_metadata]).encode()).hexdigest()
    counted = (builder.info.splits or {}).get(split)
    return counted.num_examples if counted else 0, f"stream {split} {key}"


@contextmanager
def _loading(failed: str) -> Iterator[None]:
    """Every data set has its own ways to fail."""
    try:
        yield
    except HeadshareError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise (TryAgain if is_unreached(error) else HeadshareError)(f"{failed}: {reason}") from error


def _rows(batches: Iterator[list[Any]], where: str, field: str) -> Iterator[Piece]:
    done = 0
    for batch in batches:
        for value in batch:
            done += 1
            yield Piece(_text(value, f"Row {done} of {where}", field), True, done)


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str | None):
        raise HeadshareError(f"{where} has {value!r:.40} in {field}, which is not text; name the field that holds it.")
    # JSON can spell half a surrogate pair, which is no character.
    return (value or "").encode(errors="replace").decode()


def _check_column(field: str, columns: list[str], where: str) -> None:
    if field not in columns:
        raise HeadshareError(f"{where} has no column named {field} (it has {', '.join(columns)}).")


def _needs_datasets(what: str) -> str:
    return f"{what}, install one more package: pip install 'headshare-jax[eval]'."


def sha256(path: Path) -> str:
    """Hash of a file's bytes; HeadshareError if it cannot be read."""
    with _reading(path, "a file"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    try:
        with storage.reached(path):
            yield
    except HeadshareError:
        raise
    except OSError as error:
        raise HeadshareError(explained(error)) from error
    except ValueError as error:
        raise HeadshareError(f"{path} cannot be read as {kind}: {str(error).splitlines()[0]}.") from error
