"""Run examples/finetune_llama.py and `kill -9` it at the n-th change of a checkpoint's files.

    python killed_run.py N ARGUMENTS...

A change is a file opened for writing, a folder made, or a file or folder renamed or removed, below a `checkpoint-*`
folder. Python's audit events tell of them before they happen, so nothing of the program has to be altered. What native
code writes (weights, optimizer, random state) makes no such events: there the two functions that write it are wrapped,
and the run is killed with half of the file on the disk.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "finetune_llama.py"
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def main() -> None:
    remaining = int(sys.argv[1])

    def change(what: str, path: object, prepare: Callable[[], None] = lambda: None) -> None:
        nonlocal remaining
        if "checkpoint-" in str(path):
            remaining -= 1
            if remaining == 0:
                prepare()
                print(f"killed at {what} {path}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.mkdir" and os.path.isdir(arguments[0]):
            return
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            change(event, arguments[0])

    def watched(write: Callable) -> Callable:
        def call(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            write(content, path, *args, **kwargs)
            change(f"half of {write.__name__}", path, lambda: os.truncate(path, os.path.getsize(path) // 2))

        return call

    torch.save = watched(torch.save)
    safetensors.torch.save_file = watched(safetensors.torch.save_file)
    sys.addaudithook(watch)
    sys.argv = [str(SCRIPT), *sys.argv[2:]]
    sys.path[0] = str(SCRIPT.parent)
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main()
