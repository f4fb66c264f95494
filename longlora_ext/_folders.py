"""Folders that several processes write, and that are there complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from longlora_ext._errors import writing

#: What the name of a lock's file ends with.
_LOCK = ".lock"
#: What stands in the name of a folder that is to appear, behind that name.
_UNFINISHED = ".unfinished-"


def refuse_to_overwrite(folder: Path) -> None:
    """Raise `FileExistsError` if there is anything but an empty folder, or one that cannot be replaced by another."""
    if folder.is_symlink() and not folder.exists():
        raise FileExistsError(f"{folder} is a link to {folder.readlink()}, which does not exist: choose another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: nothing is overwritten, choose another one")
    # A folder that appears when it is complete is renamed, and so takes the place of an empty one.
    if os.path.ismount(folder.resolve()):
        raise FileExistsError(f"{folder} is a mount point, in whose place no folder can be put: choose a folder in it")
    if folder.exists() and folder.samefile(os.curdir):
        raise FileExistsError(
            f"{folder} is the present working directory, which is not replaced: choose a folder in it"
        )


def take_lock(path: Path) -> FileLock | None:
    """Lock a file, which is made if need be and stays.

    The lock ends with this process, however that ends, or when it is released. Processes that are forked do not share
    it.

    Returns:
        The lock, to be kept as long as it is wanted; `None`: another process has it.

    Raises:
        `OSError`: the file cannot be made, or its file system knows no locks.
    """
    # Files in place of locks would stay when a process is killed.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its name once all is written.

    Who writes holds a lock on a file beside it, which ends with the process: what one that was killed has left is
    removed.

    Raises:
        OSError: It cannot be written, whichever library found that out.
    """
    named, folder = folder, folder.resolve()
    unfinished = folder.with_name(f"{_beginning(folder)}{secrets.token_hex(4)}")
    with writing(named):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent, _beginning(folder))
        with _locked(unfinished.with_name(unfinished.name + _LOCK)):  # before anybody can see the folder
            unfinished.mkdir()
            try:
                yield unfinished
                refuse_to_overwrite(folder)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)


def _beginning(folder: Path) -> str:
    return f".{folder.name}{_UNFINISHED}"


def remove_abandoned(parent: Path, beginning: str = ".") -> None:
    """Remove what processes that were killed have left of the folders in `parent` whose names begin so."""
    for path in list(parent.iterdir()):
        if path.name.startswith(beginning) and _UNFINISHED in path.name and path.name.endswith(_LOCK):
            with suppress(OSError):  # no locks here: then nobody can tell
                if lock := take_lock(path):
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                    path.unlink(missing_ok=True)
                    lock.release()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file of one's own, which goes with it. A file system without locks does without one."""
    lock = None
    with suppress(OSError):
        lock = take_lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if lock:
            lock.release()
