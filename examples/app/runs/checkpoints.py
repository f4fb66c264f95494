"""Which checkpoints count: those with a completion marker.

The Trainer writes a checkpoint file by file into its final folder, from several processes under ZeRO. A run
that is killed meanwhile leaves a folder that looks like a checkpoint and is none. So when all processes
have written their part and it is on the disk, a marker file is put into the folder, and only marked folders
are resumed from.

What may happen, and what a `kill -9` there leaves behind:

    1. the Trainer writes checkpoint-200        200 has no marker; the newest marked one is still there
    2. all processes wait for each other,       the marker appears at once (rename) or not at all
       everything is synced, then marked
    3. checkpoints over save_total_limit go,    200 is marked by now; a folder loses its marker before
       oldest first                             its files, so it never counts half-deleted

The Trainer's own rotation runs between 1 and 2 and could delete the last complete checkpoint; it is
switched off by `take_over_rotation`, and `CompletionMarker` does step 3.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from app.runs.json_files import read_json, write_json
from longlora_ext._processes import wait_for_all

MARKER = "complete.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> dict[int, Path]:
    """All checkpoint folders of a run by step, ascending, complete or not."""
    found = {int(m[1]): path for path in folder.glob("checkpoint-*") if (m := CHECKPOINT.fullmatch(path.name))}
    return dict(sorted(found.items()))


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoint folders of a run that have the marker, by step, ascending."""
    return {step: path for step, path in checkpoints(folder).items() if (path / MARKER).is_file()}


def mark(checkpoint: Path, content: dict[str, Any]) -> None:
    """Declare a checkpoint complete, once everything in it is on the disk."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    write_json(checkpoint / MARKER, content)


def read_marker(checkpoint: Path, *fields: str) -> dict[str, Any]:
    """What a run wrote into the marker of a complete checkpoint, with these fields in it.

    Raises:
        ValueError: It was changed.
    """
    content, kinds = read_json(checkpoint / MARKER), {"step": int, "resumable": bool, "settings": dict}
    if not isinstance(content, dict) or not all(isinstance(content.get(name), kinds[name]) for name in fields):
        raise ValueError(
            f"{checkpoint / MARKER} is not as it was written. Remove the file, and the checkpoint counts as incomplete"
        )
    return content


def step_of(checkpoint: Path) -> int:
    """The step after which a complete checkpoint was written, whatever its folder is called by now."""
    return read_marker(checkpoint, "step")["step"]


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; whatever interrupts it, what is left does not count as complete."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_incomplete(folder: Path) -> list[str]:
    """Delete the checkpoints that an interrupted run left half-written, and name them."""
    incomplete = [path for path in checkpoints(folder).values() if not (path / MARKER).is_file()]
    for path in incomplete:
        remove(path)
    return [path.name for path in incomplete]


def find_resumable(resume_from: str, output_dir: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        resume_from: `latest`, or the path of a checkpoint folder.
        output_dir: The run's output folder.

    Returns:
        The checkpoint; None when `latest` finds no complete one: the run then starts from its first step.

    Raises:
        ValueError: A path that is no complete checkpoint, or that later complete checkpoints of the same
            run would be overwritten from.
    """
    complete = complete_checkpoints(output_dir)
    if resume_from == "latest":
        return complete[max(complete)] if complete else None
    chosen = Path(resume_from)
    if not (chosen / MARKER).is_file():
        names = ", ".join(str(path) for path in complete.values()) or "none"
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: no complete checkpoint (it has no {MARKER}); "
            f"complete in {output_dir}: {names}. 'latest' takes the newest of them"
        )
    if chosen.resolve().parent == output_dir.resolve():
        later = [path.name for step, path in complete.items() if step > step_of(chosen)]
        if later:
            raise ValueError(
                f"--resume_from_checkpoint {resume_from}: {', '.join(later)} in {output_dir} would be "
                "overwritten. Move them away first, or give another --output_dir"
            )
    return chosen


def take_over_rotation(args: TrainingArguments) -> int | None:
    """Take `save_total_limit` out of a run's arguments: the Trainer would apply it too early.

    Returns:
        What it was, for `CompletionMarker`.
    """
    limit, args.save_total_limit = args.save_total_limit, None
    return limit


class CompletionMarker(TrainerCallback):
    """Marks each checkpoint when it is complete, then deletes those over the limit.

    Args:
        limit: How many to keep at most (see [`take_over_rotation`]).
        content: Gives what to write into a marker, beside the step. It is called for each checkpoint.
    """

    def __init__(self, limit: int | None, content: Callable[[], dict[str, Any]]) -> None:
        self.limit = limit
        self.content = content

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called on every process. From a checkpoint the Trainer takes over how often its run saved, logged and
        evaluated, and where the best one lay then: what counts are this call's options, and where it lies now."""
        state.compute_steps(args, state.max_steps)
        best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called on every process when its part of the checkpoint is written."""
        wait_for_all()
        if args.should_save:
            folder = Path(str(args.output_dir))
            mark(folder / f"checkpoint-{state.global_step}", {"step": state.global_step, **self.content()})
            self._rotate(folder, state.best_model_checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called on every process: what a kill between marking and deleting left is deleted now."""
        if args.should_save:
            self._rotate(Path(str(args.output_dir)), state.best_model_checkpoint)

    def _rotate(self, folder: Path, best: str | None) -> None:
        complete = list(complete_checkpoints(folder).values())
        spare = [path for path in complete[:-1] if best is None or path.name != Path(best).name]
        excess = len(complete) - self.limit if self.limit and self.limit > 0 else 0  # as the Trainer reads it
        for path in spare[: max(0, excess)]:
            remove(path)
