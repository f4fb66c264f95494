"""Reading one file: text, and rows of JSON or Parquet, as they are there.

No types are guessed: of a row only what is asked for is looked at, so the other columns may hold anything, and change
on the way. JSON is read piece by piece and Parquet in small batches, however long the file is.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from app.inputs.json_values import JsonValues, Repeated, without_mark
from app.inputs.messages import shown

#: The file formats, by suffix.
FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}

#: What may stand behind that suffix: such a file is unpacked.
PACKED = (".gz", ".zst")
KNOWN = f"{', '.join(sorted(FORMATS))}, also as {' or '.join(PACKED)}"

PIECE = 2**20  # bytes of Parquet that are read at once
BATCH = 2**22, 1000  # bytes and rows of Parquet that are unpacked at once, about and at most


def format_of(file: str | Path) -> str:
    """The format of a file of that name: `text`, `json`, `parquet`, or "" for all others."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1], "") if suffixes else ""


def state_of(file: str) -> str:
    """What tells a file from any other, and from itself before it changed.

    The time of the last change alone does not tell that: `cp -p` and `rsync -t` copy it along.
    """
    found = os.stat(file)
    return f"{os.path.abspath(file)} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def decoded(data: bytes) -> str:
    """A text in UTF-8 as it is, line breaks included, but for a byte order mark at its beginning, which is no text.

    Raises:
        ValueError: It is none, in words that follow its name.
    """
    text = without_mark(data)
    try:
        found = text.decode()
    except UnicodeDecodeError as error:
        place = error.start + len(data) - len(text)
        raise ValueError(f"is no text in UTF-8: {error.reason} at byte {place:,} (0x{data[place]:02x})") from error
    if found[:1000].count("\0") > len(found[:1000]) // 4 or "\0" * 256 in found:
        raise ValueError("is no text in UTF-8: much of it is zeros, as in UTF-16, or where a file was not written")
    return found


def read_texts(file: str, column: str) -> Iterator[bytes | None]:
    """The documents of a file, in UTF-8.

    Args:
        file: A text file, which is one document, or JSON or Parquet.
        column: What holds the text of a row.

    Yields:
        A document, None for a row without text.

    Raises:
        ValueError: What cannot be read, in words that follow the file's name.
    """
    kind = format_of(file)
    if kind == "text":
        with _unpacked(file) as stream:
            try:
                yield decoded(stream.read()).encode()
            except ValueError as error:
                raise ValueError(f"it {error}") from error
    elif kind == "parquet":
        yield from _parquet_texts(file, column)
    else:
        place, columns = "", dict[str, None]()
        for place, row in _json_rows(file):
            if column not in columns:
                columns |= dict.fromkeys(row)
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{place}: its {column!r} is {shown(text)}, not text (--text_column)")
            yield None if text is None else _encoded(place, text)
        if place:
            _check_column(column, list(columns))


def read_rows(file: str) -> Iterator[bytes]:
    """The rows of a JSON or Parquet file as JSON objects in UTF-8. What JSON has no type for is written as Python does.

    Raises:
        ValueError: What cannot be read, in words that follow the file's name.
    """
    rows = _parquet_rows(file) if format_of(file) == "parquet" else _json_rows(file)
    for place, row in rows:
        try:
            text = json_text(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        yield _encoded(place, text)


def json_text(row: dict[str, Any]) -> str:
    """A row as JSON. What JSON has no type for, as dates, is written as Python writes it."""
    return json.dumps(row, ensure_ascii=False, default=_written)


def _unpacked(file: str) -> BinaryIO:
    suffix = Path(file).suffix.lower()
    if suffix == ".zst":
        return pa.input_stream(file, compression="zstd")  # also of several frames; one that is cut off is an error
    return gzip.open(file) if suffix == ".gz" else open(file, "rb")  # type: ignore[return-value]


def _json_rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows, each with its place in the file. A string in an array is a row of text, null is a row without anything."""
    with _unpacked(file) as stream:
        try:
            values = JsonValues(stream)
        except ValueError as error:
            raise ValueError(f"it {error}") from error
        for number, (line, value) in enumerate(values, 1):
            place = f"line {line:,} (row {number:,})"
            if isinstance(value, str) and values.in_array:
                value = {"text": value}
            if not isinstance(value, dict | None):
                raise ValueError(f'{place} is {shown(value)}, not an object, {{"name": ..., ...}}')
            yield place, value or {}


def _parquet_texts(file: str, column: str) -> Iterator[bytes | None]:
    row = 0
    for batch in _parquet_batches(file, column):
        values = batch.column(0)
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind in (pa.string_view(), pa.null())):
            raise ValueError(f"its column {column!r} holds {values.type}, not text (--text_column)")
        for text in values.cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
            row += 1
            yield None if text is None else _encoded(f"row {row:,}", text.decode(errors="surrogateescape"))


def _parquet_rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    first = 1
    for batch in _parquet_batches(file):
        yield from ((f"row {number:,}", row) for number, row in enumerate(batch.to_pylist(), first))
        first += len(batch)


def _parquet_batches(file: str, column: str | None = None) -> Iterator[pa.RecordBatch]:
    with _unpacked(file) as packed, tempfile.TemporaryFile() as copy:
        stream = packed
        if Path(file).suffix.lower() in PACKED:  # its end is read first, and what is packed has to be read in order
            shutil.copyfileobj(packed, copy)
            stream = copy
        table = pyarrow.parquet.ParquetFile(stream, buffer_size=PIECE)
        names = table.schema_arrow.names
        if column is not None:
            _check_column(column, names)
        if twice := next((name for name in names if names.count(name) > 1 and column in (None, name)), None):
            raise ValueError(f"a column is given twice: {twice!r}")
        groups = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
        row_bytes = sum(group.total_byte_size for group in groups) // max(1, table.metadata.num_rows)
        rows = min(max(1, BATCH[0] // max(1, row_bytes)), BATCH[1])
        yield from table.iter_batches(rows, columns=None if column is None else [column])


def _check_column(column: str, columns: list[str]) -> None:
    if column not in columns:
        raise ValueError(f"it has no column {column!r}; it has {', '.join(columns) or 'none'} (--text_column)")


def _encoded(place: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"the byte 0x{code - 0xDC00:02x}" if code >= 0xDC80 else f"\\u{code:04x}, half of a surrogate pair"
        raise ValueError(f"{place} is no text in UTF-8: it has {what}") from error


def _written(value: Any) -> str:
    if isinstance(value, Repeated):
        raise ValueError(f"a key is given twice: {value.key!r}")
    return str(value)
