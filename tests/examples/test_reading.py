"""Reading one file as it is: text, JSON and Parquet (examples/app/inputs/reading.py, json_values.py)."""

from __future__ import annotations

import gzip
import io
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longlora_ext.attention  # noqa: F401
from app.inputs import json_values
from app.inputs.files import load_documents, read_tables
from app.inputs.json_values import JsonValues

pytestmark = pytest.mark.usefixtures("own_cache")

A, B = '{"text": "a"}', '{"text": "b"}'


def read(folder: Path, name: str, content: bytes | str, column: str = "text") -> list[str | None]:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return load_documents([str(folder / name)], column)["text"][:]


def rows_of(file: Path) -> list[object]:
    ((_, rows),) = read_tables([str(file)])
    return [json.loads(row) for row in rows["row"]]


# --- text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfimport os\n", "import os\n"),
        (b"a\xef\xbb\xbfb", "a\ufeffb"),
        (b"\xef\xbb\xbf\xef\xbb\xbfa", "\ufeffa"),
        (b"a\r\nb\rc\x0cd\x0be\n\n", "a\r\nb\rc\x0cd\x0be\n\n"),
        ("a\u2028b\x85c\x1cd".encode(), "a\u2028b\x85c\x1cd"),
        (b"one \0 of many characters", "one \0 of many characters"),
        (b"", ""),
    ],
)
def test_text_is_as_it_is_less_its_mark(tmp_path: Path, content: bytes, expected: str) -> None:
    assert read(tmp_path, "x.txt", content) == [expected]
    assert read(tmp_path, "x.txt.gz", gzip.compress(content)) == [expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 au lait", r"invalid continuation byte at byte 3 \(0xe9\)"),
        (b"\xef\xbb\xbfcaf\xe9", r"unexpected end of data at byte 6 \(0xe9\)"),
        ("text".encode("utf-16"), "at byte 0; .* byte order mark of UTF-16 "),
        ("text".encode("utf-16-le"), "much of it is zeros"),
        (b"\0" * 5000, "much of it is zeros"),
        (b"a text " * 500 + b"\0" * 5000, "much of it is zeros"),
    ],
)
def test_what_is_no_utf_8_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot read .*/x\.txt as text: it is no text in UTF-8: .*{message}"):
        read(tmp_path, "x.txt", content)


@pytest.mark.parametrize("pack", ["gzip", "zstd"])
def test_a_packed_file_that_is_cut_off_is_refused(tmp_path: Path, pack: str) -> None:
    suffix = {"gzip": ".gz", "zstd": ".zst"}[pack]
    packed = pa.compress(f"{A}\n".encode(), pack, asbytes=True) if pack == "zstd" else gzip.compress(f"{A}\n".encode())
    assert set(read(tmp_path, f"x.jsonl{suffix}", packed + packed)) == {"a"}  # of two parts
    for content in (packed[:-3], packed + packed[:-3], packed + b"something else"):
        with pytest.raises(ValueError, match=rf"cannot read .*/y\.jsonl{suffix} as json: "):
            read(tmp_path, f"y.jsonl{suffix}", content)


# --- JSON -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"{A}\n{B}\n", ["a", "b"]),
        (f"\n\n{A}\r\n \r\n{B}", ["a", "b"]),
        (f"{A}{B} {A}\r{B}", ["a", "b", "a", "b"]),
        (f"\ufeff{A}\n\ufeff{B}", ["a", "b"]),
        (json.dumps({"text": "a", "meta": [1]}, indent=2) + "\n" + json.dumps({"text": "b"}, indent=2), ["a", "b"]),
        (f"[{A}, {B}]", ["a", "b"]),
        (f"\ufeff \n[\n {A}\n,\n {B}\n]\n", ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        (f"[{A}, null]", ["a", None]),
        ('{"text": "a\u2028b\x85c\\r\\n\\u2029"}\n', ["a\u2028b\x85c\r\n\u2029"]),
        ('{"text": "\\ud83d\\ude00"}', ["😀"]),
        ('{"text": "\\ufeffa"}', ["\ufeffa"]),
        (f'{A}\n{{"id": 1}}\n{{"text": null}}\n{B}', ["a", None, None, "b"]),
        ('{"id": 1}\n{"text": "b"}', [None, "b"]),
        ('{"text": "2020-01-01"}\n{"text": "2020-01-02T03:04:05Z"}', ["2020-01-01", "2020-01-02T03:04:05Z"]),
        (f'{{"text": "a", "x": NaN, "y": -Infinity}}\n{B}', ["a", "b"]),
        (f'{{"text": "a", "x": {{"text": 1, "text": 2}}}}\n{B}', ["a", "b"]),
        (f'{{"text": "a", "x": 1}}\n{{"text": "b", "x": "1"}}\n{{"text": "c", "x": {{}}}}\n{A}', ["a", "b", "c", "a"]),
    ],
)
@pytest.mark.parametrize("piece", [1, 2**20])
def test_json_in_its_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, expected: list[str | None], piece: int
) -> None:
    monkeypatch.setattr(json_values, "PIECE", piece)
    assert read(tmp_path, "x.json", content) == expected
    assert read(tmp_path, "x.jsonl", content) == expected


def test_other_columns_may_be_no_utf_8(tmp_path: Path) -> None:
    assert read(tmp_path, "x.jsonl", b'{"text": "a", "x": "\xe9"}\n') == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'{A}\n\n{{"text": 5}}', r"line 3 \(row 2\): its 'text' is 5, not text \(--text_column\)"),
        (f'{A}\n{{"text": NaN}}', r"line 2 \(row 2\): its 'text' is nan, not text"),
        (f'{A}\n{{"text": ["b", "c"]}}', r"line 2 \(row 2\): its 'text' is \['b', 'c'\], not text"),
        (f'{A}\n{{"text": "b", "text": "c"}}', r"line 2 \(row 2\): its 'text' is given twice, not text"),
        (f"{A}\n[1]", r"line 2 \(row 2\) is \[1\], not an object"),
        (f'{A}\n"b"', r"line 2 \(row 2\) is 'b', not an object"),
        (f"[{A},\n5]", r"line 2 \(row 2\) is 5, not an object"),
        (f"{A} xyz\n{B}", r"line 1: Expecting value at 'xyz\\n"),
        (f"{A},\n{B}", "line 1: Expecting value at ',\\\\n"),
        (f'{A}\n{{"text": "b\n{A}', "line 2: Invalid control character at "),
        (f'{A}\n{{"text": "b', "line 2: Unterminated string starting at '\"b'"),
        (f"{A}\n{B[:-1]}", "line 2: Expecting ',' delimiter at the end"),
        (f"[{A},\n{B}", "line 2: the array neither goes on with ',' nor ends with ']'"),
        (f"[{A}\n{B}]", "line 2: the array neither goes on with ',' nor ends with ']'"),
        (f"[{A},]", "line 1: Expecting value at ']'"),
        (f"[{A}]\n[{B}]", "line 2: nothing may follow the array"),
        (f'{A}\n{{"text": "a\\ud800b"}}', r"line 2 \(row 2\) is no text in UTF-8: it has \\ud800, half of a surrogate"),
        (f"{A}\n" * 6 + '{"text": "\xe9"}', r"line 7 \(row 7\) is no text in UTF-8: it has the byte 0xe9"),
        ("[" * 100_000, "line 1: maximum recursion depth"),
        (f'{A}\n{{"id": {"1" * 5000}}}', "line 2: Exceeds the limit"),
        ('{"id": 1}\n{"name": "x"}', "it has no column 'text'; it has id, name"),
        ("{}", "it has no column 'text'; it has none"),
        ('{"data": [{"text": "a"}]}', "it has no column 'text'; it has data"),
        ("\n \r\n", "it has no rows"),
    ],
)
def test_json_that_cannot_be_read_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^cannot read .*/x\.jsonl as json: {message}"):
        read(tmp_path, "x.jsonl", content.encode("latin-1"))


def test_utf_16_before_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it is no text in UTF-8: .* byte order mark of UTF-16 "):
        read(tmp_path, "x.jsonl", A.encode("utf-16"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60)
@given(
    values=st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=5),
    array=st.booleans(),
    indent=st.sampled_from([None, 1]),
    escaped=st.booleans(),
    piece=st.integers(1, 40),
)
def test_json_comes_apart_at_no_piece(
    values: list[object], array: bool, indent: int | None, escaped: bool, piece: int
) -> None:
    """Whatever is cut by the pieces that are read: words, escapes, bytes of a character."""
    texts = [json.dumps(value, indent=indent, ensure_ascii=escaped) for value in values]
    content = f"[{','.join(texts)}]" if array else "\n".join(texts)
    lines = [1 + content[: sum(len(text) + 1 for text in texts[:n]) + array].count("\n") for n in range(len(texts))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_values, "PIECE", piece)
        assert list(JsonValues(io.BytesIO(content.encode()))) == list(zip(lines, values, strict=True))


def test_columns_that_change_late(tmp_path: Path) -> None:
    """After the first 10 MB, from which `datasets` infers what columns there are, and of what types."""
    big, late = "word " * 20_000, 110
    text = [{"text": f"{n} {big}", "meta": {"url": "u"} if n > late else None} for n in range(120)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, text)))
    assert load_documents([str(tmp_path / "text.jsonl")])["text"][:] == [row["text"] for row in text]
    answer = {"role": "assistant", "content": "b"}
    rows = [
        {"messages": [{"role": "user", "content": big}, answer | ({"name": "x"} if n > late else {})]}
        for n in range(120)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert rows_of(tmp_path / "rows.jsonl") == rows


# --- rows -------------------------------------------------------------------------------------------------------


def test_rows_are_what_is_there(tmp_path: Path) -> None:
    rows = [{"b": [1.5, None, "ä\u2028"], "a": {"x": True}}, {}, {"c": "\x7f\n\U0001f600"}]
    for name, content in (("x.jsonl", "\n".join(map(json.dumps, rows))), ("x.json", json.dumps(rows, indent=1))):
        (tmp_path / name).write_text(content)
        assert rows_of(tmp_path / name) == rows
    table = pa.table({"when": [date(2020, 1, 2)], "messages": [[{"role": "user", "content": "é"}]], "raw": [b"\xff"]})
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    message = {"role": "user", "content": "é"}
    assert rows_of(tmp_path / "x.parquet") == [{"when": "2020-01-02", "messages": [message], "raw": "b'\\xff'"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": {"b": 1, "b": 2}}', r"line 1 \(row 1\): a key is given twice: 'b'"),
        ('{"a": "\\udc00"}', r"line 1 \(row 1\) is no text in UTF-8: it has \\udc00, half of a surrogate pair"),
        ('{"a": 1}\n5', r"line 2 \(row 2\) is 5, not an object"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"x\.jsonl as json: {message}"):
        rows_of(tmp_path / "x.jsonl")


# --- Parquet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a", None, "b"]),
        pa.array(["a", None, "b"], pa.large_string()),
        pa.array(["a", None, "b"], pa.string_view()),
        pa.array(["a", None, "b"]).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_parquet_of_any_type_of_text(tmp_path: Path, values: pa.Array) -> None:
    pa.parquet.write_table(pa.table({"n": [{"x": 1}] * 3, "text": values}), tmp_path / "x.parquet")
    assert load_documents([str(tmp_path / "x.parquet")])["text"][:] == ["a", None, "b"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": [1]}, "its column 'text' holds int64, not text"),
        ({"text": [b"a"]}, "its column 'text' holds binary, not text"),
        ({"text": [["a"]]}, "its column 'text' holds list<.*>, not text"),
        ({"body": ["a"], "id": [1]}, "it has no column 'text'; it has body, id"),
        ({"text": pa.array([], pa.string())}, "it has no rows"),
        (pa.Table.from_arrays([["a"], ["b"]], ["text", "text"]), "a column is given twice: 'text'"),
    ],
)
def test_parquet_without_text_is_refused(tmp_path: Path, table: Any, message: str) -> None:
    pa.parquet.write_table(pa.table(table) if isinstance(table, dict) else table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=rf"cannot read .*/x\.parquet as parquet: {message}"):
        load_documents([str(tmp_path / "x.parquet")])


def test_a_column_that_rows_have_twice_is_refused(tmp_path: Path) -> None:
    """The last one counted. Beside the column of text it does no harm."""
    twice = pa.Table.from_arrays([["q"], ["a"], ["b"]], ["text", "answer", "answer"])
    pa.parquet.write_table(twice, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="a column is given twice: 'answer'"):
        [row for _, rows in read_tables([str(tmp_path / "x.parquet")]) for row in rows]
    assert load_documents([str(tmp_path / "x.parquet")])["text"][:] == ["q"]


def test_parquet_that_is_damaged_is_refused(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"text": [f"text {n}" for n in range(1000)]}), tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    for damaged in (content[:-20], content[:4] + b"\xff" * 2000 + content[2004:]):
        (tmp_path / "x.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read .*/x\.parquet as parquet: "):
            load_documents([str(tmp_path / "x.parquet")])
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9")])
    pa.parquet.write_table(pa.table({"text": bad}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=r"cannot read .*/y\.parquet as parquet: row 1 is no text in UTF-8"):
        load_documents([str(tmp_path / "y.parquet")])
