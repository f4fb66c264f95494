"""The folder a run writes to: a new one, or that of a run that goes on; and what a run must be to go on."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from app.runs.checkpoints import find_resumable, read_marker, remove_incomplete, write_json
from app.runs.folder_lock import LOCK, lock
from app.runs.launch import say
from longlora_ext._processes import on_first_process

RUN_FILE = "run.json"

#: What was trained: an adapter, or after full fine-tuning a model.
RESULTS = ("adapter", "model")


def claim(args: TrainingArguments, default_name: str, settings: dict[str, Any]) -> tuple[Path, Path | None]:
    """Settle which folder the run writes to and where it starts from, and keep other runs out of it. Collective.

    Args:
        args: The arguments; `output_dir` is filled in if it is empty.
        default_name: What to call the folder then, below `finetuned/`; a number is added where that exists.
        settings: What the losses of the run depend on. A checkpoint made with others is refused.

    Returns:
        The output folder, created and locked, and the checkpoint to resume from or None.

    Raises:
        ValueError: The folder holds something already and the run does not resume, or it cannot resume from
            there; another run writes to it; or it cannot be made.
    """
    folder, checkpoint = on_first_process(lambda: _claim(args, default_name, settings))
    args.output_dir = str(folder)
    return folder, checkpoint


def begin(folder: Path, checkpoint: Path | None, settings: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Make the claimed folder that of this run. Collective.

    Args:
        folder: The folder, claimed.
        checkpoint: What the run goes on from.
        settings: As for `claim`, completed by what was not known then.
        manifest: What to write into its `run.json`.

    Raises:
        ValueError: The checkpoint was made with other settings.
    """

    def write() -> None:
        if checkpoint:
            _compare(checkpoint, settings)
        for leftover in folder.glob(".*.unfinished*"):  # folders that were to appear when complete, and their locks
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for name in remove_incomplete(folder):
            say(f"removed {name}: the run was stopped while it wrote it")
        write_json(folder / RUN_FILE, manifest)

    on_first_process(write)


def _claim(args: TrainingArguments, default_name: str, settings: dict[str, Any]) -> tuple[Path, Path | None]:
    resume = "latest" if args.resume_from_checkpoint in ("true", "True") else args.resume_from_checkpoint
    if args.output_dir:
        folder = Path(args.output_dir)
        _check_folder(folder, resume)
        if not _lock(folder):
            raise ValueError(f"--output_dir {folder}: another run is writing to it; wait for its end or stop it first")
    else:
        names = (default_name if number == 1 else f"{default_name}-{number}" for number in count(1))
        folders = (Path("finetuned") / name for name in names)
        folder = next(folder for folder in folders if _is_free(folder) and _lock(folder))
    return folder, _checkpoint(folder, resume, settings) if resume else None


def _is_free(folder: Path) -> bool:
    """Whether a new run may write there: nothing, or what a run left that failed before it had begun."""
    return not folder.exists() or (folder.is_dir() and all(_is_begun(path.name) for path in folder.iterdir()))


def _is_begun(name: str) -> bool:
    return name == LOCK or name.startswith(RUN_FILE)


def _lock(folder: Path) -> bool:
    """Create the folder and lock it, unless another process has."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock(folder)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to: {error.strerror}") from error


def _check_folder(folder: Path, resume: str | None) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; it must be a new or an empty folder")
    if _is_free(folder):
        return
    if not (resume == "latest" or (resume and Path(resume).resolve().parent == folder.resolve())):
        raise ValueError(
            f"--output_dir {folder} is not empty, and nothing is overwritten: give another folder, or "
            "--resume_from_checkpoint latest to go on with the run in it"
        )
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"--output_dir {folder} is not empty and no run of this program (no {RUN_FILE})")


def _checkpoint(folder: Path, resume: str, settings: dict[str, Any]) -> Path | None:
    checkpoint = find_resumable(resume, folder)
    if checkpoint is None:
        if any((folder / result).exists() for result in RESULTS):
            raise ValueError(f"--output_dir {folder} holds a finished run without checkpoints to go on from")
        say(f"no complete checkpoint in {folder}: starting from the first step")
        return None
    if not read_marker(checkpoint, "resumable", "settings", "step")["resumable"]:
        raise ValueError(f"{checkpoint} was written with --save_only_model and cannot be resumed from")
    _compare(checkpoint, settings)
    return checkpoint


def _compare(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Refuse a checkpoint of other settings."""
    if others := differences(read_marker(checkpoint, "settings")["settings"], settings):
        raise ValueError(f"{checkpoint} belongs to another run: {'; '.join(others)}")


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs. What was no setting then, in another version of transformers, passes."""
    now = json.loads(json.dumps(now))
    return [
        f"{name} was {then[name]!r} and is {value!r}"
        for name, value in now.items()
        if name in then and then[name] != value
    ]
