"""The output folder of an evaluation: what was asked, what is computed so far, and the result.

    settings.json       all that the numbers depend on, written first
    cells/NAME.json     a part of the result that is complete; each is written at once (rename) or not at all
    results.txt         the table, for people
    results.json        everything, written last; the cells are in it and their folder goes

So whatever kills a run, the same command goes on from the cells that are there, alone or with another number of
processes. With other settings it is refused, and a finished evaluation is shown, not repeated.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from app.runs.folder_lock import LOCK, lock
from app.runs.json_files import read_json, write_json
from app.runs.run_folder import differences

SETTINGS = "settings.json"
CELLS = "cells"
RESULTS = "results.json"


class NotWritten(OSError):
    """A part of the result could not be written, as to a full disk."""


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = "What is computed so far is kept; the same command goes on from there"
        raise NotWritten(f"{folder} cannot be written to: {error.strerror}. {kept}") from error


def open_folder(output: str | None, default_name: str, settings: dict[str, Any]) -> Path:
    """Make the folder to write to, or take the one of an evaluation with these settings, and lock it.

    Args:
        output: The folder that `--output` names. Without it one below `evaluated/` is taken: the first that is new or
            belongs to an evaluation of these settings.
        default_name: How that is called; a number is added where there is another one of that name.
        settings: All that the numbers depend on, as JSON.

    Raises:
        ValueError: The folder holds something else, another process writes to it, or it cannot be made.
    """
    if output is not None:
        folder = Path(output)
        check_folder(folder)
        if others := _differences(folder, settings):
            raise ValueError(f"--output {folder} belongs to another evaluation: {'; '.join(others)}")
    else:
        names = (default_name if number == 1 else f"{default_name}-{number}" for number in count(1))
        folders = (Path("evaluated") / name for name in names)
        folder = next(folder for folder in folders if _is_ours(folder) and not _differences(folder, settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not lock(folder):
            raise ValueError(f"--output {folder}: another process is writing to it; wait for its end or stop it first")
        write_json(folder / SETTINGS, settings)
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be written to: {error.strerror}") from error
    return folder


def check_folder(folder: Path) -> None:
    """Raise `ValueError` if something is there that no evaluation wrote."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; it must be a folder, new or of the same evaluation")
    if not _is_ours(folder):
        raise ValueError(f"--output {folder} is not empty and no evaluation (no {SETTINGS}): nothing is overwritten")


def _is_ours(folder: Path) -> bool:
    if not folder.exists():
        return True
    begun = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    return SETTINGS in begun or all(
        name == LOCK or name.startswith(SETTINGS) for name in begun
    )  # killed before they were written


def _differences(folder: Path, settings: dict[str, Any]) -> list[str]:
    """In which of its settings the evaluation in the folder differs."""
    path = folder / SETTINGS
    if not path.is_file():
        return []
    then = read_json(path)
    if not isinstance(then, dict):
        return [f"{SETTINGS} holds no settings"]
    unknown = sorted(then.keys() ^ settings.keys())
    return differences(then, settings) or [f"one of the two has no {name}" for name in unknown]


def keep(folder: Path, cell: str, result: Any) -> None:
    """Keep what was computed for a cell.

    Raises:
        NotWritten: The file system does not take it.
    """
    with _writing(folder):
        (folder / CELLS).mkdir(exist_ok=True)
        write_json(folder / CELLS / f"{cell}.json", result)


def kept_cells(folder: Path, numbers: Collection[str]) -> dict[str, Any]:
    """Read the cells that are computed: results that have these numbers. Other files are ignored."""
    cells = {}
    for path in sorted((folder / CELLS).glob("*.json")):
        try:
            result = read_json(path)
        except ValueError:
            continue
        if _is_result(result, numbers):
            cells[path.stem] = result
    return cells


def _is_result(result: Any, numbers: Collection[str]) -> bool:
    try:
        return all(float(result[name]) >= 0 or result[name] == "nan" for name in numbers)
    except (TypeError, KeyError, ValueError, IndexError):
        return False


def write_results(folder: Path, table: str, draw: Callable[[Path], list[Path]], content: dict[str, Any]) -> list[Path]:
    """Write the result as text, as pictures and as JSON, and remove the cells that are in it.

    Returns:
        The pictures that `draw` made in the folder.

    Raises:
        NotWritten: The file system does not take it.
    """
    with _writing(folder):
        (folder / "results.txt").write_text(table, encoding="utf-8")
        pictures = draw(folder)
        write_json(folder / RESULTS, content)
    shutil.rmtree(folder / CELLS, ignore_errors=True)
    return pictures


def read_results(folder: Path, cells: Collection[str], numbers: Collection[str]) -> dict[str, Any] | None:
    """The result, if it is complete: all cells with their numbers, and a summary."""
    content = read_json(folder / RESULTS) if (folder / RESULTS).is_file() else None
    if not isinstance(content, dict) or not isinstance(content.get("summary"), dict):
        return None
    results = content.get("cells")
    complete = isinstance(results, dict) and all(_is_result(results.get(cell), numbers) for cell in cells)
    return content if complete else None
