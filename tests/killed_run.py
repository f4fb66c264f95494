"""Run examples/finetune_llama.py and `kill -9` it at the n-th change of a checkpoint's files.

    python killed_run.py N ARGUMENTS...

A change is a file opened for writing, a folder made, or a file or folder renamed or removed, below a `checkpoint-*`
folder. Python's audit events tell of them before they happen, so nothing of the program has to be altered.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "finetune_llama.py"
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def main() -> None:
    remaining = int(sys.argv[1])

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal remaining
        is_change = event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if is_change and "checkpoint-" in str(arguments[0]):
            remaining -= 1
            if remaining == 0:
                print(f"killed at {event} {arguments[0]}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv = [str(SCRIPT), *sys.argv[2:]]
    sys.path[0] = str(SCRIPT.parent)
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main()
