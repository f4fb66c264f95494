"""The text that examples are trained and measured on when the user gives none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from app.inputs import corpus

EXAMPLES = Path(corpus.__file__).parents[2]


@pytest.fixture(scope="module")
def documents() -> tuple[list[str], list[str]]:
    return corpus.stdlib_documents()


def fake_stdlib(folder: Path, names: dict[str, str]) -> Path:
    for name, text in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def text_about(subject: str, lines: int = 200) -> str:
    return "".join(f"{subject}_{n} = compute_the_{subject}_of({n})\n" for n in range(lines))


def test_is_the_same_in_every_process(documents: tuple[list[str], list[str]]) -> None:
    command = [
        sys.executable,
        "-c",
        "from app.inputs import corpus; print(*map(corpus.sha256_of_texts, corpus.stdlib_documents()))",
    ]
    for seed in ("1", "2"):
        printed = subprocess.run(
            command, cwd=EXAMPLES, env={"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, check=True
        )
        assert printed.stdout.decode().split() == [corpus.sha256_of_texts(part) for part in documents]


def test_is_enough_text_with_many_long_documents(documents: tuple[list[str], list[str]]) -> None:
    train, held_out = documents
    assert sum(map(len, train)) > 5_000_000  # about 3.3 characters a token
    assert 0.04 < sum(map(len, held_out)) / sum(map(len, train)) < 0.15
    assert sum(len(text) > 16_000 for text in train) >= 100
    assert sum(len(text) > 16_000 for text in held_out) >= 10


def test_names_defined_early_are_used_late(documents: tuple[list[str], list[str]]) -> None:
    """The long-range structure that a longer context can use: what a file's head defines, its end needs."""
    (doctest,) = (text for text in documents[1] if "class DocTestRunner" in text)
    start = doctest.index("def _normalize_module")
    assert doctest.rindex("_normalize_module(") - start > 20_000


def test_held_out_text_is_not_in_the_training_text(documents: tuple[list[str], list[str]]) -> None:
    train, held_out = documents
    assert len({*train, *held_out}) == len(train) + len(held_out)
    lines = [{line.strip() for line in text.splitlines() if len(line.strip()) >= 20} for text in train]
    seen = set[str]().union(*lines)
    for text in held_out:
        own = {line.strip() for line in text.splitlines() if len(line.strip()) >= 20}
        assert len(own & seen) <= 0.2 * len(own), text[:80]


def test_a_near_copy_of_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    text = text_about("doctest")
    copy = text.replace("_1", "_one")
    files = {"doctest.py": text, "copied.py": copy, "other.py": text_about("other", 40_000)}
    train, held_out = corpus.stdlib_documents(fake_stdlib(tmp_path, files))
    assert held_out == [text]
    assert train == [files["other.py"]]


@pytest.mark.parametrize(
    ("names", "held_out"),
    [
        (("http/client.py", "http/server.py", "http.py", "_http.py"), True),
        (("difflib.py", "_pydifflib.py", "_py_difflib.py", "difflib/__init__.py", "difflib/core.py"), True),
        (("re.py", "re/_parser.py", "sre_parse.py", "sre_compile.py"), False),
        (("datetime.py", "_pydatetime.py"), False),
    ],
)
def test_a_module_stays_in_its_part_when_it_moves(names: tuple[str, ...], held_out: bool) -> None:
    assert {corpus._is_held_out(name) for name in names} == {held_out}


def test_parts_that_may_be_missing_are_never_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "HELD_OUT_SHARE", 1.0)
    assert corpus._is_held_out("http/client.py")
    assert not corpus._is_held_out("idlelib/editor.py")
    assert not corpus._is_held_out("tkinter/__init__.py")


def test_skips_what_is_not_the_library_itself(tmp_path: Path) -> None:
    skipped = ["site-packages/torch.py", "test/test_os.py", "json/tests/a.py", "encodings/cp437.py"]
    skipped += ["_sysconfigdata__linux_x86_64-linux-gnu.py", "html/entities.py", "config-3.11-x/python.py"]
    folder = fake_stdlib(tmp_path, {name: text_about("table") for name in [*skipped, "html/parser.py"]})
    fake_stdlib(tmp_path, {"tiny.py": "x = 1\n"})
    assert list(corpus._modules(folder)) == ["html/parser.py"]


def test_reads_files_in_their_own_encoding(tmp_path: Path) -> None:
    text = "# -*- coding: latin-1 -*-\n# caf\xe9\n" + text_about("menu")
    (tmp_path / "menu.py").write_bytes(text.encode("latin-1"))
    assert corpus._modules(tmp_path)["menu.py"] == text


def test_topics_are_read_once_each_and_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "topics.py"
    assert corpus._topics(path) == {}
    topics = {"while": text_about("while"), "compound": text_about("while") + text_about("for"), "note": "x"}
    path.write_text(f"# generated\ntopics = {topics!r}\n")
    assert corpus._topics(path) == {"help/compound": topics["compound"]}


def test_says_clearly_that_the_sources_are_missing(tmp_path: Path) -> None:
    fake_stdlib(tmp_path, {"os.py": text_about("os")})
    with pytest.raises(FileNotFoundError, match=rf"not in {tmp_path}: found 1 modules .*--train_file"):
        corpus.stdlib_documents(tmp_path)


def test_fingerprint_sees_text_order_and_borders() -> None:
    assert corpus.sha256_of_texts(["ab", "c"]) == corpus.sha256_of_texts(iter(["ab", "c"]))
    different = (["ab", "c"], ["c", "ab"], ["a", "bc"], ["abc"], [])
    assert len({corpus.sha256_of_texts(documents) for documents in different}) == 5
