"""Text and rows from what a user names: files, folders and glob patterns, or datasets of the hub."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from app.inputs.cache import cache_named, cached
from app.inputs.reading import KNOWN, format_of, json_text
from app.runs.launch import say
from app.runs.wording import counted

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")


def is_there(source: str) -> bool:
    """Whether a file, a folder or files of a glob pattern are there under just that name."""
    path = Path(source).expanduser()
    return os.path.lexists(path) or bool(matching(path))


def find_files(source: str) -> list[str]:
    """The files that one `--train_file` names. What is left out of a folder or a pattern is said.

    Args:
        source: A file, a folder (searched with its subfolders), or a glob pattern.

    Returns:
        Paths in sorted order; none when `source` looks like a dataset on the hub.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: A file of a format that cannot be read, or what is no file.
        OSError: A folder that cannot be searched.
    """
    files, left_out = _find(source)
    _tell(source, left_out)
    return files


def check_named_once(sources: Sequence[str]) -> None:
    """Raise `ValueError` if two sources name one file or dataset, and as `find_files` does."""
    owners: dict[str, tuple[int, str]] = {}
    for number, source in enumerate(sources):
        for file in _find(source)[0] or [source]:  # of the hub
            owner, other = owners.setdefault(os.path.realpath(file), (number, source))
            if owner != number:
                raise ValueError(f"{file} is named twice: by {other} and by {source}")


def _find(source: str) -> tuple[list[str], Counter[str]]:
    """The files of a source, and how many of what was left out."""
    path = Path(source).expanduser()
    if path.is_dir():
        found, left_out = search(path)
        files = [file for file in found if format_of(file)]
        left_out += Counter(f"{Path(file).suffix or 'other'} file" for file in found if not format_of(file))
        if not files:
            raise FileNotFoundError(f"the folder {source} holds no file to train on; looked for {KNOWN}")
    else:
        found = [str(path)] if os.path.lexists(path) else matching(path)
        files = [file for file in found if not os.path.isdir(file)]
        entered = {parent for file in files for parent in Path(file).parents}  # as of the pattern **
        left_out = Counter("folder" for file in found if os.path.isdir(file) and Path(file) not in entered)
        if not files:
            if HUB_NAME.fullmatch(source) and not format_of(source):
                return [], left_out
            raise FileNotFoundError(
                f"{source}: no such file, folder or glob pattern, nor a dataset name of the form "
                "OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME:CONFIG:SPLIT"
            )
    for file in files:
        if not os.path.isfile(file):
            what = "neither a file nor a folder" if os.path.exists(file) else "a link to a file that is not there"
            raise ValueError(f"{file} is {what}")
        if not format_of(file):
            raise ValueError(f"{file}: cannot read files ending in {Path(file).suffix!r}; can read {KNOWN}")
    once = list({os.path.realpath(file): file for file in reversed(files)}.values())[::-1]
    left_out["repeated file"] += len(files) - len(once)
    return once, left_out


def search(folder: Path) -> tuple[list[str], Counter[str]]:
    """Search a folder with its subfolders, but for hidden ones.

    Links to folders are followed, into each folder once and into none that holds the one that is searched.

    Returns:
        The files that are not hidden, sorted, and how many of what was left out.

    Raises:
        OSError: A folder that cannot be searched.
    """
    files: list[str] = []
    left_out: Counter[str] = Counter()
    seen = {folder.resolve(), *folder.resolve().parents}

    def stop(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        left_out["hidden name"] += sum(name.startswith(".") for name in [*folders, *names])
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
        inner = {Path(parent, name).resolve(): name for name in sorted(folders, reverse=True) if name[0] != "."}
        left_out["repeated folder"] += sum(name[0] != "." for name in folders) - len(inner.keys() - seen)
        folders[:] = [name for place, name in inner.items() if place not in seen]
        seen |= inner.keys()
    return sorted(files), left_out


def load_documents(sources: Sequence[str], text_column: str = "text") -> datasets.Dataset:
    """Read documents from files or from the hub.

    Args:
        sources: Files, folders, glob patterns, or hub datasets (`OWNER/NAME[:CONFIG[:SPLIT]]`). A text file
            is one document; JSON Lines, JSON and Parquet hold one document a row.
        text_column: The column that holds the text of JSON, Parquet and hub datasets. The others may hold anything.

    Returns:
        A dataset with the one column `text`, in the order of the sources, files sorted within each. A text is as it
        stands in its file, less a byte order mark at the file's beginning; it is None for a row without any.

    Raises:
        FileNotFoundError: A source that is not there.
        ValueError: What cannot be read, with its file and row, a dataset without that column, or a file named twice.
        OSError: The cache cannot be written to.
    """
    return datasets.concatenate_datasets(
        [
            cached(files, text_column) if files else _select_text(source, _from_hub(source), text_column)
            for source, files in _each(sources)
        ]
    )


def read_tables(sources: Sequence[str]) -> Iterator[tuple[str, datasets.Dataset]]:
    """Read files of rows, or hub datasets, one by one.

    Args:
        sources: As for `load_documents`; of a folder or a glob pattern the text files are left alone.

    Returns:
        The name of each file or hub dataset, and its rows: a dataset with the one column `row`, a JSON object each.

    Raises:
        FileNotFoundError: A source that is not there.
        ValueError: A source without files of rows, what cannot be read, with its file and row, or a file named twice.
        OSError: The cache cannot be written to.
    """
    for source, files in _each(sources):
        tables = [file for file in files if format_of(file) != "text"]
        if files and not tables:
            raise ValueError(f"{source} is text; rows are read from .json, .jsonl and .parquet files")
        _tell(source, Counter({"text file": len(files) - len(tables)}))
        for file in tables:
            yield file, cached([file], None)
        if not files:
            rows = _from_hub(source)
            with cache_named():
                yield source, rows.map(_as_json, remove_columns=rows.column_names, features=ROW)


ROW = datasets.Features({"row": datasets.Value("large_string")})


def _as_json(row: dict[str, Any]) -> dict[str, str]:
    return {"row": json_text(dict(row))}


def _each(sources: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The sources with their files, in none of which another's is read again."""
    check_named_once(sources)
    for source in sources:
        yield source, find_files(source)


def matching(pattern: Path) -> list[str]:
    """The files of a glob pattern, in which folders that are there as they are written are no patterns."""
    folder = next(parent for parent in pattern.parents if os.path.exists(parent))
    return sorted(glob.glob(str(Path(glob.escape(str(folder)), pattern.relative_to(folder))), recursive=True))


def _tell(source: str, left_out: Counter[str]) -> None:
    things = [counted(number, thing) for thing, number in left_out.most_common() if number]
    if things:
        more = f" and {counted(len(things) - 5, 'other kind')}" if len(things) > 5 else ""
        say(f"note: {source}: left out {', '.join(things[:5])}{more}")


def _from_hub(source: str) -> datasets.Dataset:
    name, config, split = (*source.split(":"), None, None)[:3]
    try:
        return datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # offline, unknown, gated, no such config or split: as many types as causes
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{source} is no local file or folder, and as a dataset of the hub it cannot be loaded: {said}"
        ) from error


def _select_text(source: str, rows: datasets.Dataset, column: str) -> datasets.Dataset:
    if column not in rows.column_names:
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(rows.column_names)} (--text_column)")
    if getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"{source}: column {column!r} holds {rows.features[column]}, not text (--text_column)")
    rows = rows.select_columns([column])
    if column != "text":
        rows = rows.rename_column(column, "text")
    return rows.cast_column("text", datasets.Value("large_string"))
