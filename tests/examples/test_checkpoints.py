"""Checkpoints that count: markers and rotation as file operations, without a run (app/runs/checkpoints.py)."""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from app.runs.checkpoints import (
    MARKER,
    CompletionMarker,
    complete_checkpoints,
    find_resumable,
    mark,
    remove_incomplete,
    take_over_rotation,
)

FILES = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json")


def write_checkpoint(folder: Path, step: int, files: int = len(FILES)) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True, exist_ok=True)
    for name in FILES[:files]:
        (path / name).write_text(f"{name} of step {step}")
    return path


def is_whole(checkpoint: Path) -> bool:
    """A checkpoint with all its files, whose marker, if it has one, can be read."""
    marker = checkpoint / MARKER
    assert not marker.is_file() or isinstance(json.loads(marker.read_text()), dict)
    return all((checkpoint / name).is_file() for name in FILES)


# --- markers, as file operations --------------------------------------------------------------------------------


def test_only_marked_checkpoints_count(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        mark(write_checkpoint(tmp_path, step), {"step": step})
    write_checkpoint(tmp_path, 200)
    (tmp_path / "checkpoint-best").mkdir()
    assert list(complete_checkpoints(tmp_path)) == [9, 10, 100]
    assert find_resumable("latest", tmp_path) == tmp_path / "checkpoint-100"
    assert remove_incomplete(tmp_path) == ["checkpoint-200"]
    assert (tmp_path / "checkpoint-best").is_dir()
    assert find_resumable("latest", tmp_path / "nothing") is None


def test_a_path_must_be_a_complete_checkpoint_and_the_newest_of_its_run(tmp_path: Path) -> None:
    mark(write_checkpoint(tmp_path, 10), {"step": 10})
    mark(write_checkpoint(tmp_path, 9), {"step": 9})
    write_checkpoint(tmp_path, 20)
    with pytest.raises(ValueError, match=rf"no complete checkpoint \(it has no {MARKER}\).*checkpoint-10"):
        find_resumable(str(tmp_path / "checkpoint-20"), tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-10 in .* would be overwritten"):
        find_resumable(str(tmp_path / "checkpoint-9"), tmp_path)
    assert find_resumable(str(tmp_path / "checkpoint-10"), tmp_path) == tmp_path / "checkpoint-10"
    assert find_resumable(str(tmp_path / "checkpoint-9"), tmp_path / "other") == tmp_path / "checkpoint-9"


class Crash(BaseException):
    """What a kill is to the code it hits: nothing can catch it and go on."""


OPERATIONS = [
    (builtins, "open"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync"), (os, "open"),
]  # fmt: skip


def crash_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the `number`-th file operation from here on, and all after it, raise `Crash` in place of happening."""
    count = 0

    def crashing(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count >= number:
                raise Crash
            return function(*args, **kwargs)

        return call

    for module, name in OPERATIONS:
        monkeypatch.setattr(module, name, crashing(getattr(module, name)))


@pytest.mark.parametrize("limit", [1, 2])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Marking and rotation, stopped before each of their file operations in turn."""
    steps = (2, 4, 6)
    for number in range(1, 200):
        folder = tmp_path / str(number)
        for step in steps:
            mark(write_checkpoint(folder, step), {})
        write_checkpoint(folder, 8)
        args = TrainingArguments(str(folder), save_total_limit=limit, report_to="none", use_cpu=True)
        callback = CompletionMarker(take_over_rotation(args), dict)
        state = TrainerState(global_step=8)
        try:
            with monkeypatch.context() as patch:
                crash_at(number, patch)
                callback.on_save(args, state, TrainerControl())
        except Crash:
            newest = find_resumable("latest", folder)
            assert newest is not None and newest.name in ("checkpoint-6", "checkpoint-8")
            assert all(is_whole(path) for path in complete_checkpoints(folder).values())
            remove_incomplete(folder)
            assert all(is_whole(path) for path in folder.glob("checkpoint-*"))
        else:
            assert list(complete_checkpoints(folder)) == [2, 4, 6, 8][-limit:]
            assert sorted(folder.iterdir()) == sorted(complete_checkpoints(folder).values())
            break
    assert number > 10


def test_rotation_is_taken_from_the_trainer_and_spares_the_best(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), save_total_limit=2, report_to="none", use_cpu=True)
    callback = CompletionMarker(take_over_rotation(args), lambda: {"settings": {"seed": 1}})
    assert args.save_total_limit is None
    best = os.path.relpath(tmp_path / "checkpoint-1")  # as the run spelled it before it was interrupted
    for step in range(1, 5):
        write_checkpoint(tmp_path, step)
        callback.on_save(args, TrainerState(global_step=step, best_model_checkpoint=best), TrainerControl())
    assert list(complete_checkpoints(tmp_path)) == [1, 4]
    assert json.loads((tmp_path / "checkpoint-4" / MARKER).read_text()) == {"step": 4, "settings": {"seed": 1}}


def test_a_marker_holds_what_is_known_at_its_step(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), save_total_limit=2, report_to="none", use_cpu=True)
    measured: list[str] = []
    callback = CompletionMarker(2, lambda: {"perplexity": measured})
    assert args.save_total_limit == 2  # nothing is changed by making one
    for step, row in enumerate(("before", "after"), 1):
        measured.append(row)
        write_checkpoint(tmp_path, step)
        callback.on_save(args, TrainerState(global_step=step), TrainerControl())
    markers = [json.loads((tmp_path / f"checkpoint-{step}" / MARKER).read_text()) for step in (1, 2)]
    assert [marker["perplexity"] for marker in markers] == [["before"], ["before", "after"]]


def test_checkpoints_over_the_limit_go_at_the_end_at_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        mark(write_checkpoint(tmp_path, step), {"step": step})
    args = TrainingArguments(str(tmp_path), save_total_limit=1, report_to="none", use_cpu=True)
    CompletionMarker(take_over_rotation(args), dict).on_train_end(args, TrainerState(global_step=3), TrainerControl())
    assert list(complete_checkpoints(tmp_path)) == [3]


@pytest.mark.parametrize("limit", [None, 0, -1])
def test_without_a_limit_all_checkpoints_stay(tmp_path: Path, limit: int | None) -> None:
    args = TrainingArguments(str(tmp_path), save_total_limit=limit, report_to="none", use_cpu=True)
    callback = CompletionMarker(take_over_rotation(args), dict)
    for step in range(1, 4):
        write_checkpoint(tmp_path, step)
        callback.on_save(args, TrainerState(global_step=step), TrainerControl())
    assert list(complete_checkpoints(tmp_path)) == [1, 2, 3]
