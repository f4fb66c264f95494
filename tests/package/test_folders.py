"""Locks that end with their process, and folders that appear when they are complete (longlora_ext/_folders.py)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest

from app.runs import folder_lock
from longlora_ext._folders import appearing, refuse_to_overwrite, take_lock

HOLDER = """
import os, sys, time
from pathlib import Path
from longlora_ext._folders import take_lock
lock = take_lock(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
time.sleep(600)
"""


@contextmanager
def holder(lock: Path) -> Iterator[subprocess.Popen]:
    """A process that holds a lock and has forked another since, both killed in the end."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process
            os.kill(child, 0)  # it is alive
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


def test_a_lock_ends_with_its_process_whatever_that_has_forked(tmp_path: Path) -> None:
    with holder(tmp_path / "lock") as process:
        assert take_lock(tmp_path / "lock") is None
        process.kill()
        process.wait()
        taken = take_lock(tmp_path / "lock")
        assert taken is not None
        assert take_lock(tmp_path / "lock") is None  # nor does this process get it twice
        taken.release()
        assert take_lock(tmp_path / "lock") is not None


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def test_a_file_system_without_locks_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        take_lock(tmp_path / "lock")
    assert folder_lock.lock(tmp_path)
    assert "cannot be locked (Function not implemented): take care" in capsys.readouterr().out
    (tmp_path / ".out.unfinished-1").mkdir()  # of a process that may be alive
    (tmp_path / ".out.unfinished-1.lock").touch()
    with appearing(tmp_path / "out") as unfinished:
        (unfinished / "file").touch()
    assert (tmp_path / "out" / "file").is_file()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"lock", ".lock", "out", ".out.unfinished-1", ".out.unfinished-1.lock"}


def test_this_process_locks_a_folder_again_also_one_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for _ in range(2):
        folder.mkdir()
        assert folder_lock.lock(folder) and folder_lock.lock(folder)
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(folder / ".lock").acquire(blocking=False)
        (folder / ".lock").unlink()
        folder.rmdir()


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), appearing(tmp_path / "out") as unfinished:
        (unfinished / "file").touch()
        assert len(list(tmp_path.iterdir())) == 2  # the folder and its lock
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_replaced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    refuse_to_overwrite(out)
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: Path(path) == out)
        for folder in (out, tmp_path / "link"):
            with pytest.raises(FileExistsError, match=f"{folder} is a mount point, .*: choose a folder in it"):
                refuse_to_overwrite(folder)
        refuse_to_overwrite(out / "model")
    monkeypatch.chdir(out)
    for folder in (out, Path()):
        with pytest.raises(
            FileExistsError, match=f"{folder} is the present working directory, .*: choose a folder in it"
        ):
            refuse_to_overwrite(folder)
    refuse_to_overwrite(Path("model"))
