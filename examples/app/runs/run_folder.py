"""The folder that a run writes to: a new one, or that of a run that goes on, and from which checkpoint."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

from app.runs.checkpoints import find_resumable, read_marker
from app.runs.folder_lock import LOCK, lock
from app.runs.launch import say

RUN_FILE = "run.json"

#: What was trained: an adapter, or after full fine-tuning a model.
RESULTS = ("adapter", "model")


def take_folder(output_dir: str | None, resume_from: str | None, default_name: str) -> Path:
    """The folder that a run writes to, made and locked.

    Args:
        output_dir: The folder. Default: one below `finetuned/`.
        resume_from: None, `latest`, or the folder of a checkpoint.
        default_name: What to call the folder by default; a number is added where that exists.

    Raises:
        ValueError: The folder holds something already and the run does not resume, or is no folder of a run; another
            run writes to it; or it cannot be made.
    """
    if output_dir:
        folder = Path(output_dir)
        _check_folder(folder, resume_from)
        if not _lock(folder):
            raise ValueError(f"--output_dir {folder}: another run is writing to it; wait for its end or stop it first")
        return folder
    names = (default_name if number == 1 else f"{default_name}-{number}" for number in count(1))
    folders = (Path("finetuned") / name for name in names)
    return next(folder for folder in folders if _is_free(folder) and _lock(folder))


def find_checkpoint(folder: Path, resume_from: str) -> Path | None:
    """The checkpoint to go on from; None if the run in the folder has no complete one.

    Raises:
        ValueError: There is none, though the run is over, or it cannot be resumed from.
    """
    checkpoint = find_resumable(resume_from, folder)
    if checkpoint is None:
        if any((folder / result).exists() for result in RESULTS):
            raise ValueError(f"--output_dir {folder} holds a finished run without checkpoints to go on from")
        say(f"no complete checkpoint in {folder}: starting from the first step")
        return None
    if not read_marker(checkpoint, "resumable", "settings", "step")["resumable"]:
        raise ValueError(f"{checkpoint} was written with --save_only_model and cannot be resumed from")
    return checkpoint


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How settings differ. What was no setting then, in another version of transformers, passes."""
    now = json.loads(json.dumps(now))
    return [
        f"{name} was {then[name]!r} and is {value!r}"
        for name, value in now.items()
        if name in then and then[name] != value
    ]


def _is_free(folder: Path) -> bool:
    """Whether a new run may write there: nothing, or what a run left that failed before it had begun."""
    return not folder.exists() or (folder.is_dir() and all(_may_be_left(path.name) for path in folder.iterdir()))


def _may_be_left(name: str) -> bool:
    return name == LOCK or name.startswith(RUN_FILE)


def _lock(folder: Path) -> bool:
    """Create the folder and lock it, unless another process has."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock(folder)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to: {error.strerror}") from error


def _check_folder(folder: Path, resume_from: str | None) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; it must be a new or an empty folder")
    if _is_free(folder):
        return
    if not (resume_from == "latest" or (resume_from and Path(resume_from).resolve().parent == folder.resolve())):
        raise ValueError(
            f"--output_dir {folder} is not empty, and nothing is overwritten: give another folder, or "
            "--resume_from_checkpoint latest to go on with the run in it"
        )
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"--output_dir {folder} is not empty and no run of this program (no {RUN_FILE})")
