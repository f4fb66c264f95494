"""Reading text and rows: from files, folders and glob patterns, or from datasets of the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import datasets
from datasets.data_files import DataFilesList

#: The file formats, by suffix: which reader of `datasets` takes them.
READERS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}

#: What may stand behind that suffix: `datasets` unpacks such a file, with the package zstandard the second kind too.
PACKED = (".gz", ".zst")
KNOWN = f"{', '.join(sorted(READERS))}, also as {' or '.join(PACKED)}"

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")


def reader_of(file: str | Path) -> str:
    """Which reader of `datasets` takes a file of that name; empty if none does."""
    path = Path(file)
    return READERS.get(Path(path.stem).suffix if path.suffix in PACKED else path.suffix, "")


def find_files(source: str) -> list[str]:
    """The files that one `--train_file` names.

    Args:
        source: A file, a folder (searched with its subfolders), or a glob pattern.

    Returns:
        Paths in sorted order; none when `source` looks like a dataset on the hub.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: A file of a format that cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if file.is_file() and reader_of(file))
        if not files:
            raise FileNotFoundError(f"the folder {source} holds no file to train on; looked for {KNOWN}")
        return files
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    files = [file for file in files if Path(file).is_file()]
    if not files:
        if HUB_NAME.fullmatch(source) and not reader_of(source):
            return []
        raise FileNotFoundError(
            f"{source}: no such file, folder or glob pattern, nor a dataset name of the form "
            "OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME:CONFIG:SPLIT"
        )
    for file in files:
        if not reader_of(file):
            raise ValueError(f"{file}: cannot read files ending in {Path(file).suffix!r}; can read {KNOWN}")
    return files


def load_documents(sources: Sequence[str], text_column: str = "text") -> datasets.Dataset:
    """Read documents from files or from the hub.

    Args:
        sources: Files, folders, glob patterns, or hub datasets (`OWNER/NAME[:CONFIG[:SPLIT]]`). A text file
            is one document; JSON Lines, JSON and Parquet hold one document a row.
        text_column: The column that holds the text of JSON, Parquet and hub datasets.

    Returns:
        A dataset with the one column `text`, in the order of the sources, files sorted within each.

    Raises:
        FileNotFoundError: A source that is not there.
        ValueError: A file that cannot be read, or a dataset without that column.
    """
    parts = []
    for source in sources:
        files = find_files(source)
        if not files:
            parts.append(_select_text(source, _from_hub(source), text_column))
        for reader, group in groupby(files, key=reader_of):
            if reader == "text":
                parts.append(_select_text(source, _from_files(reader, list(group)), "text"))
            else:  # one by one: their other columns may differ
                parts += [_select_text(file, _from_files(reader, [file]), text_column) for file in group]
    if any(part.features != parts[0].features for part in parts):  # readers have two types of strings
        parts = [part.cast_column("text", datasets.Value("large_string")) for part in parts]
    return datasets.concatenate_datasets(parts)


def read_tables(sources: Sequence[str]) -> Iterator[tuple[str, datasets.Dataset]]:
    """Read files of rows, or hub datasets, one by one and with all their columns.

    Args:
        sources: As for `load_documents`; of a folder or a glob pattern the text files are left alone.

    Returns:
        The name of each file or hub dataset, and what it holds.

    Raises:
        FileNotFoundError: A source that is not there.
        ValueError: A source without files of rows, or one that cannot be read.
    """
    for source in sources:
        files = find_files(source)
        tables = [file for file in files if reader_of(file) != "text"]
        if files and not tables:
            raise ValueError(f"{source} is text; rows are read from .json, .jsonl and .parquet files")
        for file in tables:
            yield file, _from_files(reader_of(file), [file])
        if not files:
            yield source, _from_hub(source)


def _from_files(reader: str, files: list[str]) -> datasets.Dataset:
    options = {"sample_by": "document"} if reader == "text" else {}
    nothing = [file for file in files if reader != "text" and Path(file).stat().st_size == 0]
    if nothing:
        raise ValueError(f"{nothing[0]} is empty")
    data_files = {"train": _as_they_are(files)}
    try:
        return datasets.load_dataset(reader, data_files=data_files, split="train", **options)
    except Exception as error:  # datasets wraps what went wrong in errors of its own, several deep
        cause = error.__cause__ or error
        reason = "it has no rows" if "corresponds to no data" in str(cause) else _in_short(cause)
        raise ValueError(f"cannot read {', '.join(files[:3])} as {reader}: {reason}") from error


def _as_they_are(files: list[str]) -> DataFilesList:
    """Files by their names, which `datasets` would else take for glob patterns, each with what tells that it changed.

    `datasets` itself goes by the time of the last change alone, and `cp -p` and `rsync -t` copy that along.
    """
    paths = [str(Path(file).absolute()) for file in files]
    for path in paths:
        if "::" in path:  # to `datasets` it is a file within another
            raise ValueError(f"{path}: files with '::' in their path cannot be read; rename what has it")
    stats = [Path(path).stat() for path in paths]
    return DataFilesList(
        paths, [(f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}",) for found in stats]
    )


def _from_hub(source: str) -> datasets.Dataset:
    name, config, split = (*source.split(":"), None, None)[:3]
    try:
        return datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # offline, unknown, gated, no such config or split: as many types as causes
        raise ValueError(
            f"{source} is no local file or folder, and as a dataset of the hub it cannot be loaded: {_in_short(error)}"
        ) from error


def _select_text(source: str, rows: datasets.Dataset, column: str) -> datasets.Dataset:
    if column not in rows.column_names:
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(rows.column_names)} (--text_column)")
    if getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"{source}: column {column!r} holds {rows.features[column]}, not text (--text_column)")
    rows = rows.select_columns([column])
    if column != "text":
        rows = rows.rename_column(column, "text")
    return rows


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
