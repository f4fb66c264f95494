"""An output folder belongs to one run at a time."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from app.runs.launch import say

#: The file that is locked, hidden: it stays when the run is over.
LOCK = ".lock"

#: The locks of this process, held until it ends, however it ends.
_locks: list[IO[str]] = []


def lock(folder: Path) -> bool:
    """Lock a folder, unless another process has. Workers that this process forks do not share the lock.

    Raises:
        OSError: It cannot be written to.
    """
    opened = open(folder / LOCK, "a")  # noqa: SIM115  (open as long as the process lives)
    _locks.append(opened)
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        say(f"note: {folder} cannot be locked ({error.strerror}): take care that no two runs write to it")
    return True
