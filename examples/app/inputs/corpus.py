"""Real text that every Python installation has: the standard library of the running CPython.

`stdlib_documents()` gives the library's modules and the language reference that ships for `help()` as
documents. They are long (many of them thousands of tokens) and they are hard to read in short pieces: a
name is defined at the top of a file and used to its end. That is what a model with a longer context should
profit from, so this is what the tiny Llama of `examples/tiny_llama` is trained on and what
`finetune_llama.py` extends it on when no text is given.

The two parts are split by name and never by chance: a package is either training text or held-out text as a
whole, under every version of Python, so what is held out has never been seen, neither by the tiny Llama nor
by its adapter.

    python examples/app/inputs/corpus.py       # says what is in the two parts
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterable
from pathlib import Path

#: Folders that hold no text to learn from: other people's packages, tests, tables, grammars, binaries.
SKIPPED_FOLDERS = {
    "__pycache__", "__phello__", "_distutils_hack", "dist-packages", "encodings", "idle_test", "lib-dynload",
    "lib2to3", "pydoc_data", "site-packages", "test", "tests",
}  # fmt: skip

#: Files that are generated, mostly a table, or not CPython's own.
SKIPPED_FILES = re.compile(
    r"_sysconfigdata.*|_sysconfig_vars.*|_opcode_metadata|_distutils_system_mod|entities|keyword|locale|opcode"
    r"|sitecustomize|stringprep|this|usercustomize|__hello__"
)

#: Parts that some installations lack: never held out, so that everybody measures on the same files.
OPTIONAL_PARTS = {"distutils", "ensurepip", "idlelib", "tkinter", "turtledemo", "venv"}

#: Modules that moved: under their old name or their new one, they stay in the same part of the split.
MOVED = {"sre": "re"}

#: The split: which names are held out, and about what share of the text. Changing either makes the shipped
#: tiny Llama a model that has seen some of its test.
SPLIT_SEED = 106
HELD_OUT_SHARE = 0.08
MIN_CHARACTERS = 1_000
MIN_LINE = 20
MAX_SHARED = 0.2
MIN_TRAIN_CHARACTERS = 1_000_000


def stdlib_documents(stdlib: str | Path | None = None) -> tuple[list[str], list[str]]:
    """Read the standard library's text as training and held-out documents.

    Args:
        stdlib: The library's folder. Default: that of the running interpreter.

    Returns:
        `(train, held_out)`: two lists of documents, sorted by name and the same at every call. No document,
        and no near-copy of one, is in both; the parts are chosen by the modules' names, so they agree
        between versions.

    Raises:
        FileNotFoundError: The library's sources are not there (an installation of compiled files only, or a
        zip).
    """
    folder = Path(stdlib or sysconfig.get_path("stdlib"))
    documents = _modules(folder) | _topics(folder / "pydoc_data" / "topics.py")
    train = {name: text for name, text in documents.items() if not _is_held_out(name)}
    held_out = {name: text for name, text in documents.items() if _is_held_out(name)}

    # Some modules repeat each other (aifc and wave), and what is held out must be news after training.
    held_out_lines = set[str]().union(*map(_lines, held_out.values()))
    train = {name: text for name, text in train.items() if _share(_lines(text), held_out_lines) <= MAX_SHARED}

    characters = sum(map(len, train.values()))
    if characters < MIN_TRAIN_CHARACTERS or not held_out:
        raise FileNotFoundError(
            f"the sources of Python's standard library are not in {folder}: found {len(documents)} modules "
            f"with {characters:,} characters, needed {MIN_TRAIN_CHARACTERS:,}. Use an interpreter that is "
            "installed with its .py files (Debian: apt-get install libpython3-stdlib), or train on a text of "
            "your own (finetune_llama.py: --train_file)"
        )
    return list(train.values()), list(held_out.values())


def sha256_of_texts(documents: Iterable[str]) -> str:
    """The SHA-256 of a list of documents, in hex: equal when and only when texts and order are equal."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _modules(folder: Path) -> dict[str, str]:
    """The text of each module worth reading, by its path below `folder` in POSIX spelling, sorted."""
    found: dict[str, str] = {}
    for path in folder.rglob("*.py"):
        relative = path.relative_to(folder)
        parents = relative.parts[:-1]
        if SKIPPED_FOLDERS.intersection(parents) or any(part.startswith("config-") for part in parents):
            continue
        if SKIPPED_FILES.fullmatch(path.stem):
            continue
        with tokenize.open(path) as file:  # honours the coding cookie
            text = file.read()
        if len(text) >= MIN_CHARACTERS:
            found[relative.as_posix()] = text
    return dict(sorted(found.items()))


def _topics(path: Path) -> dict[str, str]:
    """The chapters of the language reference behind `help("...")`, where they are installed."""
    if not path.is_file():
        return {}
    (table,) = (
        node.value
        for node in ast.parse(path.read_bytes()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "topics"
    )
    kept: dict[str, str] = {}
    seen: set[str] = set()
    # Short topics are often paragraphs of long ones ("while" is in "compound"): the long ones come first
    # and stay.
    for name, text in sorted(ast.literal_eval(table).items(), key=lambda item: (-len(item[1]), item[0])):
        lines = _lines(text)
        if len(text) >= MIN_CHARACTERS and _share(lines, seen) <= MAX_SHARED:
            kept[f"help/{name}"] = text
            seen |= lines
    return dict(sorted(kept.items()))


def _is_held_out(name: str) -> bool:
    """Whether a document is held out, by a hash of its top-level module's (or topic's) name alone."""
    top, _, rest = name.removesuffix(".py").partition("/")
    if top in OPTIONAL_PARTS:
        return False
    # _pydatetime and datetime, _collections_abc and collections, sre_parse and re/_parser are one text
    # each.
    family = rest if top == "help" else re.sub(r"^_(py_?)?", "", top).split("_")[0]
    digest = hashlib.sha256(f"{SPLIT_SEED} {MOVED.get(family, family)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def _lines(text: str) -> set[str]:
    """The lines that are long enough to say where a text comes from."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= MIN_LINE}


def _share(lines: set[str], others: set[str]) -> float:
    return len(lines & others) / max(1, len(lines))


if __name__ == "__main__":
    for title, documents in zip(("train", "held out"), stdlib_documents(), strict=True):
        long = sum(len(document) >= 16_000 for document in documents)
        print(
            f"{title}: {len(documents)} documents, {sum(map(len, documents)):,} characters, "
            f"{long} of them 16,000 characters or longer, SHA-256 {sha256_of_texts(documents)[:16]}"
        )
    print(f"Python {sys.version.split()[0]}")
