"""Folders that several processes write, and that are there complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


def is_first_process() -> bool:
    """Whether this is the process that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first_process(action: Callable[[], None]) -> None:
    """Run it on the first process; if it fails there, fail on all, so that none waits for ever."""
    failure: Exception | None = None
    if is_first_process():
        try:
            action()
        except Exception as error:  # handed on below, on every process
            failure = error
    if dist.is_initialized():
        message = [None if failure is None else str(failure)]
        dist.broadcast_object_list(message, src=0)
        if failure is None and message[0] is not None:
            raise RuntimeError(f"the first process failed: {message[0]}")
    if failure is not None:
        raise failure


def refuse_to_overwrite(folder: Path) -> None:
    """Raise `FileExistsError` if there is anything but an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: nothing is overwritten, choose another one")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its name once all is written."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed, in a container with this number
    unfinished.mkdir()
    try:
        yield unfinished
        refuse_to_overwrite(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
