"""The folder a run writes to: a new one, or that of a run that goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from checkpoints import MARKER, find_resumable, remove_incomplete, write_json
from launch import say
from transformers import TrainingArguments

RUN_FILE = "run.json"

#: What was trained: an adapter, or after full fine-tuning a model.
RESULTS = ("adapter", "model")


def claim(args: TrainingArguments, default_name: str, settings: dict[str, Any]) -> tuple[Path, Path | None]:
    """Settle which folder the run writes to and where it starts from. Collective: every process calls it.

    Args:
        args: The arguments; `output_dir` is filled in if it is empty.
        default_name: What to call the folder then, below `finetuned/`; a number is added where that exists.
        settings: What the losses of the run depend on. A checkpoint made with others is refused.

    Returns:
        The output folder, created, and the checkpoint to resume from or None.

    Raises:
        ValueError: The folder holds something already and the run does not resume, or it cannot resume from
            there.
    """
    state = PartialState()
    if not args.output_dir:
        args.output_dir = broadcast_object_list([_free_folder(Path("finetuned"), default_name)])[0]
    folder = Path(args.output_dir)
    resume = "latest" if args.resume_from_checkpoint in ("true", "True") else args.resume_from_checkpoint
    resume_from = _check(folder, resume, settings)

    state.wait_for_everyone()  # nobody touches the folder before all have seen the same
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.unfinished*"):  # folders that were to appear when complete
            shutil.rmtree(leftover)
        for name in remove_incomplete(folder):
            say(f"removed {name}: the run was stopped while it wrote it")
        write_json(folder / RUN_FILE, settings)
    state.wait_for_everyone()
    return folder, resume_from


def _free_folder(parent: Path, name: str) -> str:
    number = 1
    while not _is_free(folder := parent / (name if number == 1 else f"{name}-{number}")):
        number += 1
    return str(folder)


def _is_free(folder: Path) -> bool:
    """Whether a new run may write there: nothing, or what a run left that failed before it had begun."""
    return not folder.exists() or (folder.is_dir() and all(path.name.startswith(RUN_FILE) for path in folder.iterdir()))


def _check(folder: Path, resume: str | None, settings: dict[str, Any]) -> Path | None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; it must be a new or an empty folder")
    continues = resume == "latest" or (resume and Path(resume).resolve().parent == folder.resolve())
    if not _is_free(folder):
        if not continues:
            raise ValueError(
                f"--output_dir {folder} is not empty, and nothing is overwritten: give another folder, or "
                "--resume_from_checkpoint latest to go on with the run in it"
            )
        if not (folder / RUN_FILE).is_file():
            raise ValueError(f"--output_dir {folder} is not empty and no run of this program (no {RUN_FILE})")
    if not resume:
        return None
    checkpoint = find_resumable(resume, folder)
    if checkpoint is None:
        if any((folder / result).exists() for result in RESULTS):
            raise ValueError(f"--output_dir {folder} holds a finished run without checkpoints to go on from")
        say(f"no complete checkpoint in {folder}: starting from the first step")
        return None
    marker = json.loads((checkpoint / MARKER).read_text())
    if not marker["resumable"]:
        raise ValueError(f"{checkpoint} was written with --save_only_model and cannot be resumed from")
    differences = [
        f"{name} was {marker['settings'].get(name)!r} and is {value!r}"
        for name, value in settings.items()
        if marker["settings"].get(name) != value
    ]
    if differences:
        raise ValueError(f"{checkpoint} belongs to another run: {'; '.join(differences)}")
    return checkpoint
