"""An output folder belongs to one run at a time."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from app.runs.launch import say
from longlora_ext._folders import take_lock

#: The file that is locked, hidden: it stays when the run is over.
LOCK = ".lock"

#: The locks of this process, held until it ends, however it ends.
_locks: dict[Path, FileLock] = {}


def lock(folder: Path) -> bool:
    """Lock a folder, unless another process has. Workers that this process forks do not share the lock.

    Raises:
        OSError: It cannot be written to.
    """
    path = folder.resolve() / LOCK
    path.touch()
    if path in _locks:
        _locks.pop(path).release()
    try:
        taken = take_lock(path)
    except OSError as error:
        say(f"note: {folder} cannot be locked ({error.strerror}): take care that no two runs write to it")
        return True
    if taken is None:
        return False
    _locks[path] = taken
    return True
