"""Run examples/finetune_llama.py and `kill -9` it at the n-th change of a checkpoint's files, or see all such kills.

    python killed_run.py N ARGUMENTS...
    python killed_run.py FOLDER ARGUMENTS...

With a folder the run goes to its end, and what a kill would have left of its output is copied at each change: to
FOLDER/1, FOLDER/2 and so on, each beside a file N.txt that says where that was. A kill leaves the disk as it is.

A change is a file opened for writing, a folder made, or a file or folder renamed or removed, below a `checkpoint-*`
folder. Python's audit events tell of them before they happen, so nothing of the program has to be altered. What native
code writes (weights, optimizer, random state) makes no such events: there the two functions that write it are wrapped,
and the run is killed with half of the file on the disk.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "finetune_llama.py"
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def halve(path: Path) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def kill(point: str) -> None:
    print(f"killed at {point}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def copy_output(point: str, path: Path, to: Path) -> Path:
    """Returns where the copy has `path`."""
    (output,) = (folder.parent for folder in (path, *path.parents) if "checkpoint-" in folder.name)
    shutil.copytree(output, to)
    to.with_suffix(".txt").write_text(point)
    return to / path.relative_to(output)


def main() -> None:
    wanted, points, copying = sys.argv[1], 0, False

    def change(what: str, path: object, is_half: bool = False) -> None:
        nonlocal points, copying
        if "checkpoint-" not in str(path) or copying:
            return
        points += 1
        point, there = f"{what} {path}", Path(str(path))
        if wanted.isdigit() and points == int(wanted):
            if is_half:
                halve(there)
            kill(point)
        elif not wanted.isdigit():
            copying = True  # which opens files as well
            there = copy_output(point, there, Path(wanted) / str(points))
            if is_half:
                halve(there)
            copying = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.mkdir" and os.path.isdir(arguments[0]):
            return
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            change(event, arguments[0])

    def watched(write: Callable) -> Callable:
        def call(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            write(content, path, *args, **kwargs)
            change(f"half of {write.__name__}", path, is_half=True)

        return call

    torch.save = watched(torch.save)
    safetensors.torch.save_file = watched(safetensors.torch.save_file)
    sys.addaudithook(watch)
    sys.argv = [str(SCRIPT), *sys.argv[2:]]
    sys.path[0] = str(SCRIPT.parent)
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main()
