"""Folders that several processes write, and that are there complete or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError


def refuse_to_overwrite(folder: Path) -> None:
    """Raise `FileExistsError` if there is anything but an empty folder."""
    if folder.is_symlink() and not folder.exists():
        raise FileExistsError(f"{folder} is a link to {folder.readlink()}, which does not exist: choose another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: nothing is overwritten, choose another one")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its name once all is written.

    Who writes holds a lock on it, which ends with the process: what one that was killed has left is removed.

    Raises:
        OSError: It cannot be written, whichever library found that out.
    """
    named, folder = folder, folder.resolve()
    beginning = f".{folder.name}.unfinished-"
    unfinished = folder.with_name(beginning + secrets.token_hex(4))
    with _writing(named), ExitStack() as held:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent, wait=True):  # nobody sees the new folder before it is locked
            for other in folder.parent.iterdir():
                if other.name.startswith(beginning):
                    with _locked(other, wait=False) as abandoned:
                        if abandoned:
                            shutil.rmtree(other, ignore_errors=True)
            unfinished.mkdir()
            held.enter_context(_locked(unfinished, wait=True))
        try:
            yield unfinished
            refuse_to_overwrite(folder)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Whoever finds the disk full, it is an `OSError` that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {folder}: {error}") from error


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Lock a folder, and tell whether that was possible: another process may hold it, or the disk know no locks."""
    opened = None
    try:
        opened = os.open(folder, os.O_RDONLY)
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        got = True
    except OSError:
        got = False
    try:
        yield got
    finally:
        if opened is not None:
            os.close(opened)
