"""Reading text and rows (examples/inputs/files.py)."""

from __future__ import annotations

import json
import os
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import datasets
import pandas
import pytest

import longlora_ext.attention  # noqa: F401
from inputs.files import find_files, load_documents, read_tables
from inputs.tokens import tokenise
from patience import wait_until
from tiny_texts import character_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("first\n\nstill first\n")
    (folder / "more" / "b.md").write_text("second")
    (folder / "c.jsonl").write_text('{"text": "third"}\n{"text": null, "id": 1}\n{"text": "fourth"}\n')
    (folder / "d.json").write_text(json.dumps([{"text": "fifth", "body": "sixth"}]))
    pandas.DataFrame({"text": ["seventh", ""], "n": [1, 2]}).to_parquet(folder / "e.parquet")
    (folder / "ignored.bin").write_bytes(b"\0")
    return folder


def test_each_format_and_each_way_to_name_files(files: Path) -> None:
    def read(*sources: Path | str, column: str = "text") -> list[str | None]:
        return load_documents([str(source) for source in sources], column)["text"][:]

    assert read(files / "a.txt") == ["first\n\nstill first\n"]
    assert read(files / "c.jsonl") == ["third", None, "fourth"]
    assert read(files / "d.json") == ["fifth"]
    assert read(files / "d.json", column="body") == ["sixth"]
    assert read(files / "e.parquet") == ["seventh", ""]
    assert read(files / "e.parquet", files / "a.txt")[0] == "seventh"
    assert read(files / "*.txt", files / "more" / "b.md") == ["first\n\nstill first\n", "second"]
    assert read(files / "**" / "*.md") == ["second"]
    assert sorted(filter(None, read(files))) == sorted(
        ["first\n\nstill first\n", "second", "third", "fourth", "fifth", "seventh"]
    )


@pytest.mark.parametrize("pack", ["gzip", *(["zstandard"] if find_spec("zstandard") else [])])
def test_packed_files_are_unpacked(files: Path, pack: str) -> None:
    plain = load_documents([str(files)])["text"][:]
    for name in ("a.txt", "more/b.md", "c.jsonl", "d.json"):
        content = (files / name).read_bytes()
        (files / name).unlink()
        (files / f"{name}{'.gz' if pack == 'gzip' else '.zst'}").write_bytes(import_module(pack).compress(content))
    assert load_documents([str(files)])["text"][:] == plain
    (row,) = read_tables([str(files / "d.json.*")])
    assert row[1]["body"][:] == ["sixth"]


def test_text_column_does_not_concern_text_files(files: Path) -> None:
    assert load_documents([str(files / "d.json"), str(files / "a.txt")], "body")["text"][:] == [
        "sixth",
        "first\n\nstill first\n",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere.txt", "no such file, folder or glob pattern"),
        (lambda folder: folder / "*.tsv", "no such file, folder or glob pattern"),
        (lambda folder: folder / "ignored.bin", r"cannot read files ending in '.bin'; can read .json, "),
        (lambda folder: _touch(folder / "empty"), "holds no file to train on"),
        (lambda folder: _write(folder / "x.jsonl", b'{"body": "x"}\n'), "no column 'text'; it has body"),
        (lambda folder: _write(folder / "x.jsonl", b'{"text": [1, 2]}\n'), "not text"),
        (lambda folder: _write(folder / "x.jsonl", b'{"text": "x\n'), "cannot read .*x.jsonl as json"),
        (lambda folder: _write(folder / "x.jsonl", b""), "x.jsonl is empty"),
        (lambda folder: _write(folder / "x.json", b"[]"), "x.json as json: it has no rows"),
        (lambda folder: _write(folder / "x.txt", b"\xff\xfe\xfa"), "cannot read .*x.txt as text: .*utf-8"),
        (lambda folder: _write(folder / "x.jsonl.gz", b"no"), "cannot read .*x.jsonl.gz as json: Not a gzipped file"),
        (lambda folder: _write(folder / "x.tar.gz", b""), r"cannot read files ending in '.gz'; can read .*also as .gz"),
        (lambda folder: _write(folder / "x.parquet", b"nothing"), "cannot read .*x.parquet as parquet"),
    ],
)
def test_what_cannot_be_read_is_named(files: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_documents([str(make(files))])


def _write_document(path: Path, text: str) -> None:
    if path.suffix == ".parquet":
        pandas.DataFrame({"text": [text]}).to_parquet(path)
    else:
        path.write_text(text if path.suffix == ".txt" else json.dumps({"text": text}) + "\n")


def _touch(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_name_is_no_pattern(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "g[1]"
    folder.mkdir()
    for name in ("a[1]", "a1", "b*", "b2", "c:d"):
        _write_document(folder / f"{name}{suffix}", name)
    assert load_documents([str(folder / f"a[1]{suffix}")])["text"][:] == ["a[1]"]
    assert sorted(load_documents([str(folder)])["text"]) == ["a1", "a[1]", "b*", "b2", "c:d"]


def test_a_relative_name_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file:x.txt").write_text("x")
    assert load_documents(["file:x.txt"])["text"][:] == ["x"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_two_colons_are_refused(tmp_path: Path, suffix: str) -> None:
    _write_document(tmp_path / f"a::b{suffix}", "x")
    with pytest.raises(ValueError, match=f"^/.*/a::b{suffix}: files with '::' in their path cannot be read"):
        load_documents([str(tmp_path)])


def wait_for_tick(probe: Path) -> None:
    """Wait until the clock of the file system has gone on: every few milliseconds on most, every second on some."""
    probe.touch()
    begun = probe.stat().st_ctime_ns

    def ticked() -> bool:
        probe.touch()
        return probe.stat().st_ctime_ns > begun

    wait_until(ticked)
    probe.unlink()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("how", ["written over", "moved there"])
def test_another_text_with_the_same_time_is_read_anew(tmp_path: Path, suffix: str, how: str) -> None:
    text, other = tmp_path / f"text{suffix}", tmp_path / f"other{suffix}"
    for path, content in ((text, "aaa"), (other, "bbb")):
        _write_document(path, content)
        os.utime(path, (1e9, 1e9))
    tokenizer = character_tokenizer()
    assert tokenise(load_documents([str(text)]), tokenizer).ids(0).tolist() == [3, 3, 3, 1]
    wait_for_tick(tmp_path / "probe")
    shutil.copy2(other, text) if how == "written over" else other.replace(text)
    assert text.stat().st_mtime == 1e9
    assert tokenise(load_documents([str(text)]), tokenizer).ids(0).tolist() == [4, 4, 4, 1]


def test_the_same_text_comes_from_the_cache(tmp_path: Path) -> None:
    text = _write(tmp_path / "x.txt", b"abc")
    first, again = (load_documents([str(text)]) for _ in range(2))
    assert first.cache_files == again.cache_files and len(list((tmp_path / "cache").glob("text/*"))) == 1


def test_hub_names_are_recognised() -> None:
    for name in ("owner/name", "owner/name:config", "owner/name:config:validation"):
        assert find_files(name) == []
    for name in ("name", "owner/name.txt", "a/b/c", "owner/name:a:b:c"):
        with pytest.raises(FileNotFoundError):
            find_files(name)


def test_hub_dataset_that_cannot_be_loaded_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="owner/name is no local file or folder, and as a dataset of the hub"):
        load_documents(["owner/name"])


def test_hub_dataset_is_loaded_with_its_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: str | None, **kwargs: str) -> datasets.Dataset:
        asked.append((*args, kwargs))
        return datasets.Dataset.from_dict({"text": ["from the hub"]})

    monkeypatch.setattr("inputs.files.datasets.load_dataset", load_dataset)
    assert load_documents(["o/n", "o/n:c", "o/n:c:s"])["text"][:] == ["from the hub"] * 3
    assert asked == [
        ("o/n", None, {"split": "train"}),
        ("o/n", "c", {"split": "train"}),
        ("o/n", "c", {"split": "s"}),
    ]
