"""Text that is read is kept: the same text comes from the cache, another one does not, and memory does not grow."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

import longlora_ext.attention  # noqa: F401
from app.inputs.files import load_documents, read_tables
from app.inputs.tokens import tokenise
from patience import wait_until
from tiny_texts import character_tokenizer, write_bytes, write_document

pytestmark = pytest.mark.usefixtures("own_cache")


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
        write_document(path, content)
        os.utime(path, (1e9, 1e9))
    tokenizer = character_tokenizer()
    assert tokenise(load_documents([str(text)]), tokenizer).ids(0).tolist() == [3, 3, 3, 1]
    wait_for_tick(tmp_path / "probe")
    shutil.copy2(other, text) if how == "written over" else other.replace(text)
    assert text.stat().st_mtime == 1e9
    assert tokenise(load_documents([str(text)]), tokenizer).ids(0).tolist() == [4, 4, 4, 1]


def test_the_same_text_comes_from_the_cache(tmp_path: Path) -> None:
    text = write_bytes(tmp_path / "x.txt", b"abc")
    first, again = (load_documents([str(text)]) for _ in range(2))
    assert first.cache_files == again.cache_files and len(list((tmp_path / "cache").glob("longlora_text/*"))) == 1


@pytest.mark.parametrize("read", ["text", "rows", "tokens"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    """Below a file, and on a disk that takes no more."""
    text = str(write_bytes(tmp_path / "x.jsonl", b'{"text": "%s"}\n' % (b"abc " * 50_000)))
    documents = load_documents([text]) if read == "tokens" else None

    def work() -> None:
        if documents is not None:
            tokenise(documents, character_tokenizer())
        else:
            list(read_tables([text])) if read == "rows" else load_documents([text])

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(OSError, match=r"^the cache, .*/cache, cannot be written to: File too large. "):
            work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    work()  # nothing half written is left
    if read != "tokens":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(text) / "cache")
        with pytest.raises(OSError, match=r"^the cache, .*/x.jsonl/cache, cannot be written to: Not a directory. "):
            work()


def test_stopped_by_hand_it_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_bytes(tmp_path / "x.jsonl", b'{"text": "a"}\n' * 30_000)

    def stop(self: object, rows: list[bytes]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("app.inputs.cache._Builder._table", stop)
        with pytest.raises(KeyboardInterrupt):
            load_documents([str(text)])
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert len(load_documents([str(text)])) == 30_000


def test_processes_take_turns(tmp_path: Path) -> None:
    text = write_bytes(tmp_path / "x.jsonl", b'{"text": "a"}\n' * 30_000)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(_read, [str(text)] * 3)
    assert len(set(found)) == 1 and found[0][1] == 30_000


def _read(file: str) -> tuple[str, int]:
    documents = load_documents([file])
    return documents.cache_files[0]["filename"], len(documents)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be measured here")
@pytest.mark.parametrize("kind", ["lines", "array", "texts", "parquet", "packed"])
def test_memory_does_not_grow_with_a_file(tmp_path: Path, kind: str) -> None:
    """Of 128 MB of text a few pieces are in memory at once. The texts are written one by one, for the same reason."""
    texts = (f"{number:03} " + "word " * 200_000 for number in range(128))
    if kind == "texts":
        for number, text in enumerate(texts):
            (tmp_path / f"{number:03}.txt").write_text(text)
    elif kind == "parquet":
        with pyarrow.parquet.ParquetWriter(tmp_path / "x.parquet", pyarrow.schema({"text": "string"})) as writer:
            for text in texts:
                writer.write_table(pyarrow.table({"text": [text]}))
    else:
        name = {"lines": "x.jsonl", "array": "x.json", "packed": "x.jsonl.gz"}[kind]
        with (gzip.open if kind == "packed" else open)(tmp_path / name, "wt") as file:
            for number, text in enumerate(texts):
                file.write(("[" if number == 0 else ",") if kind == "array" else "\n")
                json.dump({"text": text}, file)
            file.write("]" if kind == "array" else "")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    documents = load_documents([str(tmp_path)])
    assert resident("VmHWM") - before < 100e6
    assert [text[:4] for text in documents["text"]] == [f"{number:03} " for number in range(128)]


def resident(what: str) -> int:
    """Bytes in memory: now, `VmRSS`, or at most, `VmHWM`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024
