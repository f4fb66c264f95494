"""What a user names, and the cache of what is read there (examples/app/inputs/files.py, cache.py)."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import datasets
import pandas
import pyarrow.parquet
import pytest

import longlora_ext.attention  # noqa: F401
from app.inputs.files import find_files, load_documents, read_tables
from tiny_texts import write_bytes, write_document

pytestmark = pytest.mark.usefixtures("own_cache")


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


@pytest.mark.parametrize("pack", ["gzip", "zstd"])
def test_packed_files_are_unpacked(files: Path, pack: str) -> None:
    plain = load_documents([str(files)])["text"][:]
    for name in ("a.txt", "more/b.md", "c.jsonl", "d.json", "e.parquet"):
        content = (files / name).read_bytes()
        (files / name).unlink()
        with pyarrow.output_stream(files / f"{name}{'.gz' if pack == 'gzip' else '.zst'}", compression=pack) as packed:
            packed.write(content)
    assert load_documents([str(files)])["text"][:] == plain
    ((_, rows),) = read_tables([str(files / "d.json.*")])
    assert json.loads(rows["row"][0]) == {"text": "fifth", "body": "sixth"}


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
        (lambda folder: write_bytes(folder / "x.jsonl", b'{"body": "x"}\n'), "no column 'text'; it has body"),
        (lambda folder: write_bytes(folder / "x.jsonl", b'{"text": [1, 2]}\n'), "not text"),
        (lambda folder: write_bytes(folder / "x.jsonl", b'{"text": "x\n'), "cannot read .*x.jsonl as json"),
        (lambda folder: write_bytes(folder / "x.jsonl", b""), "x.jsonl as json: it has no rows"),
        (lambda folder: write_bytes(folder / "x.json", b"[]"), "x.json as json: it has no rows"),
        (
            lambda folder: write_bytes(folder / "x.txt", b"abc\xfa"),
            "x.txt as text: it is no text in UTF-8: .* at byte 3 ",
        ),
        (
            lambda folder: write_bytes(folder / "x.jsonl.gz", b"no"),
            "cannot read .*x.jsonl.gz as json: Not a gzipped file",
        ),
        (
            lambda folder: write_bytes(folder / "x.tar.gz", b""),
            r"cannot read files ending in '.gz'; can read .*also as .gz",
        ),
        (lambda folder: write_bytes(folder / "x.parquet", b"nothing"), "cannot read .*x.parquet as parquet"),
    ],
)
def test_what_cannot_be_read_is_named(files: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_documents([str(make(files))])


def _touch(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_name_is_no_pattern(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "g[1]"
    folder.mkdir()
    for name in ("a[1]", "a1", "b*", "b2", "c:d", "e::f"):
        write_document(folder / f"{name}{suffix}", name)
    assert load_documents([str(folder / f"a[1]{suffix}")])["text"][:] == ["a[1]"]
    (tmp_path / "g1").mkdir()
    assert load_documents([str(folder / f"b?{suffix}")])["text"][:] == ["b*", "b2"]  # g1 is not meant
    assert sorted(load_documents([str(folder)])["text"]) == ["a1", "a[1]", "b*", "b2", "c:d", "e::f"]


def test_a_relative_name_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file:x.txt").write_text("x")
    assert load_documents(["file:x.txt"])["text"][:] == ["x"]


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

    monkeypatch.setattr("app.inputs.files.datasets.load_dataset", load_dataset)
    assert load_documents(["o/n", "o/n:c", "o/n:c:s"])["text"][:] == ["from the hub"] * 3
    ((_, rows),) = read_tables(["o/n"])
    assert rows["row"][:] == ['{"text": "from the hub"}']
    asked.pop()
    assert asked == [
        ("o/n", None, {"split": "train"}),
        ("o/n", "c", {"split": "train"}),
        ("o/n", "c", {"split": "s"}),
    ]


def test_what_is_left_out_of_a_folder_is_said(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".hidden.txt", ".git/x.txt", "more/.ipynb_checkpoints/b.md", "x.csv", "y.csv", "LICENSE"):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text("not to be read")
    (files / "UPPER.TXT").write_text("read")
    assert [Path(file).name for file in find_files(str(files))] == [
        "UPPER.TXT", "a.txt", "c.jsonl", "d.json", "e.parquet", "b.md",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said == f"note: {files}: left out 3 hidden names, 2 .csv files, 1 other file, 1 .bin file\n"
    find_files(str(files / "[am]*"))
    assert capsys.readouterr().out == f"note: {files / '[am]*'}: left out 1 folder\n"
    assert find_files(str(files / "more" / "**")) == [str(files / "more" / "b.md")]
    assert capsys.readouterr().out == ""
    list(read_tables([str(files)]))
    assert f"note: {files}: left out 3 text files\n" in capsys.readouterr().out


def test_links_are_followed_once_and_never_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path in (folder, elsewhere / "deep"):
        path.mkdir(parents=True)
        (path / "x.txt").write_text(path.name)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere / "deep")
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "y.txt").symlink_to(folder / "x.txt")
    assert sorted(load_documents([str(folder)])["text"]) == ["deep", "folder"]
    assert "left out 3 repeated folders, 1 repeated file" in capsys.readouterr().out
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    with pytest.raises(ValueError, match=r"gone.txt is a link to a file that is not there"):
        load_documents([str(folder)])


def test_a_file_is_not_named_twice(files: Path) -> None:
    for sources in ((files, files / "a.txt"), (files / "a.txt", files / "*.txt"), (files / "a.txt", files / "a.txt")):
        with pytest.raises(ValueError, match=f"a.txt is named twice: by {re.escape(str(sources[0]))} and by "):
            load_documents([str(source) for source in sources])


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.txt")
    for source in (tmp_path, tmp_path / "x.txt"):
        with pytest.raises(ValueError, match=r"x.txt is neither a file nor a folder"):
            load_documents([str(source)])


def test_the_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"b{number}.txt").write_text("good text")
    (tmp_path / "b7.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"^cannot read [^ ]*/b7\.txt as text: it is no text in UTF-8: .* at byte 3 "):
        load_documents([str(tmp_path)])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
def test_what_may_not_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name), Path(name, "cache")
        folder.chmod(0o755)
        cache.mkdir(mode=0o777)
        cache.chmod(0o777)
        (folder / "x.txt").write_text("x")
        (folder / "x.txt").chmod(0)
        datasets.config.HF_DATASETS_CACHE = cache
        os.seteuid(65534)
        try:
            with pytest.raises(ValueError, match=r"cannot read .*/x.txt as text: Permission denied"):
                load_documents([str(folder / "x.txt")])
            os.seteuid(0)
            (folder / "closed").mkdir(mode=0)
            os.seteuid(65534)
            with pytest.raises(OSError, match=r"Permission denied: '.*/closed'"):
                load_documents([name])
        finally:
            os.seteuid(0)
