"""Checkpoints that count, and runs that go on from them (checkpoints.py, run.py in examples/app/runs)."""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

import finetune_runs
import merge_adapter
from app.runs.checkpoints import (
    MARKER,
    CompletionMarker,
    complete_checkpoints,
    find_resumable,
    mark,
    remove_incomplete,
    take_over_rotation,
)
from finetune_runs import environment, losses, run, small_run
from patience import patience, wait_until
from same_run import assert_same_run

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "killed_run.py"
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


# --- real runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run(*small_run(*inputs, output))
    assert done.returncode == 0, done.stderr
    return output


def killed(point: int, arguments: list[str]) -> str | None:
    """Run until the kill; returns where that was, or None if the run came to its end."""
    command = [sys.executable, str(HELPER), str(point), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=patience())
    if done.returncode == 0:
        return None
    assert done.returncode == -signal.SIGKILL, done.stderr
    return re.search("killed at .*", done.stderr)[0]  # type: ignore[index]


def test_undisturbed_run_learns(undisturbed: Path) -> None:
    found = losses(undisturbed)
    assert found[6] < found[1] - 0.2
    table = json.loads((undisturbed / "perplexity.json").read_text())["perplexity"]
    assert all(table["after"][length] < 0.9 * table["before"][length] for length in table["before"])


#: Of the changes of checkpoint files in a run of 6 steps that saves every 2nd: in the middle of the second save.
@pytest.mark.parametrize("point", [17])
def test_a_killed_run_goes_on_with_the_losses_of_an_undisturbed_one(
    inputs: tuple[Path, Path], undisturbed: Path, tmp_path: Path, point: int
) -> None:
    arguments = [*small_run(*inputs, tmp_path / "out"), "--resume_from_checkpoint", "latest"]
    where = killed(point, arguments)
    assert where is not None and "killed at half of save" in where and "checkpoint-4" in where
    assert list(complete_checkpoints(tmp_path / "out")) == [2]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "going on from checkpoint-2" in done.stdout
    assert done.stdout.count("'loss':") == 4  # of the steps 3 to 6: it did not begin anew
    assert_same_run(tmp_path / "out", undisturbed)


@pytest.mark.full
def test_a_kill_at_every_change_of_a_checkpoint(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """The second of two saves, which also deletes the first one's checkpoint, killed at each of its points in turn."""
    limit = ["--resume_from_checkpoint", "latest", "--save_total_limit", "1"]
    first = [*small_run(*inputs, tmp_path / "first", steps=2), *limit]
    whole = [*small_run(*inputs, tmp_path / "whole", steps=4), *limit]
    for arguments in (first, whole):
        assert run(*arguments).returncode == 0
    places = []
    for point in range(1, 100):
        output = tmp_path / str(point)
        shutil.copytree(tmp_path / "first", output)
        arguments = [*small_run(*inputs, output, steps=4), *limit]
        where = killed(point, arguments)
        if where is None:
            break
        places.append(where)
        complete = complete_checkpoints(output)
        assert complete and set(complete) <= {2, 4}, where
        done = run(*arguments)
        assert done.returncode == 0, f"{where}: {done.stderr}"
        assert f"going on from checkpoint-{max(complete)}" in done.stdout
        assert_same_run(output, tmp_path / "whole")
    for file in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth"):
        assert any("half of" in where and where.endswith(f"checkpoint-4/{file}") for where in places), places
    assert any("checkpoint-2" in where for where in places), places


def go_on_from_2(whole: Path, output: Path, result: str) -> None:
    """Make `output` what `whole` was after its checkpoint of step 2."""
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoint-4")
    shutil.rmtree(output / result)


@pytest.mark.full
def test_full_fine_tuning_goes_on(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    whole = run(*small_run(*inputs, tmp_path / "whole", steps=4), "--full_finetune")
    assert whole.returncode == 0, whole.stderr
    go_on_from_2(tmp_path / "whole", tmp_path / "out", "model")
    done = run(*small_run(*inputs, tmp_path / "out", steps=4), "--full_finetune", "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert "going on from checkpoint-2" in done.stdout
    assert "missing keys" not in done.stdout + done.stderr
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "whole")]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] - weights[1][name]).abs().max() <= 1e-4 for name in weights[0])


def test_a_run_killed_at_its_very_end_trains_no_further(
    undisturbed: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """All steps are done and in a checkpoint, the adapter is not: the state between the last save and the results."""
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    shutil.rmtree(output / "adapter")
    for name in ("loss.png", "perplexity.txt"):
        (output / name).unlink()
    done = run(*small_run(*inputs, output), "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert (output / "loss.png").is_file() and (output / "perplexity.txt").is_file()
    assert_same_run(output, undisturbed)


def test_a_finished_run_can_be_made_longer(inputs: tuple[Path, Path], undisturbed: Path, tmp_path: Path) -> None:
    shorter = tmp_path / "out"
    assert run(*small_run(*inputs, shorter, steps=4)).returncode == 0
    done = run(*small_run(*inputs, shorter, steps=6), "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert "going on from checkpoint-4" in done.stdout
    assert_same_run(shorter, undisturbed)


def test_an_adapter_is_made_of_a_checkpoint(
    inputs: tuple[Path, Path], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the options that a program names which is given the checkpoint instead."""
    checkpoint = undisturbed / "checkpoint-4"
    with pytest.raises(SystemExit, match="2"):
        merge_adapter.main([str(checkpoint), str(tmp_path / "merged")])
    options = re.search(r"--resume_from_checkpoint .*(?= --output_dir)", capsys.readouterr().err)
    done = run(*small_run(*inputs, tmp_path / "out"), *options[0].split())  # type: ignore[index]
    assert done.returncode == 0 and "'loss':" not in done.stdout, done.stderr
    adapter = tmp_path / "out" / "adapter"
    then, now = (load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, adapter))
    assert then.keys() == now.keys() and all(now[name].equal(weight) for name, weight in then.items())
    merge_adapter.main([str(adapter), str(tmp_path / "merged")])


@pytest.mark.full
def test_a_run_that_goes_on_elsewhere_takes_its_perplexities_along(
    inputs: tuple[Path, Path], undisturbed: Path, tmp_path: Path
) -> None:
    """With other settings for what no loss depends on; and the rows of another text do not come along."""
    checkpoint = undisturbed / "checkpoint-4"
    given = [*small_run(*inputs, tmp_path / "out"), "--resume_from_checkpoint", str(checkpoint)]
    done = run(*given, "--save_steps", "6", "--logging_first_step")
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((folder / "perplexity.json").read_text()) for folder in (undisturbed, tmp_path / "out"))
    assert after["perplexity"] == {row: pytest.approx(values) for row, values in before["perplexity"].items()}

    given[given.index(str(tmp_path / "out"))] = str(tmp_path / "less")
    done = run(*given, "--eval_tokens", "100")
    assert done.returncode == 0, done.stderr
    assert "were measured on other text" in done.stdout
    assert list(json.loads((tmp_path / "less" / "perplexity.json").read_text())["perplexity"]) == ["after"]


def test_a_run_does_not_go_on_with_another_text(inputs: tuple[Path, Path], undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "out")
    changed = tmp_path / "text.jsonl"
    changed.write_text(inputs[1].read_text().replace("document 3:", "document e:"))
    done = run(*small_run(inputs[0], changed, tmp_path / "out"), "--resume_from_checkpoint", "latest")
    assert done.returncode == 2
    assert re.search(r"checkpoint-6 belongs to another run: train_sha256 was '\w+' and is '\w+'\n", done.stderr)


def test_two_runs_do_not_write_to_one_folder(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """The second is refused while the first one lives, also where it would resume; a kill frees the folder."""
    arguments = [*small_run(*inputs, tmp_path / "out", steps=100000), "--resume_from_checkpoint", "latest"]
    first = subprocess.Popen(
        [sys.executable, str(finetune_runs.SCRIPT), *arguments],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: list((tmp_path / "out").glob("checkpoint-*")), lambda: first.poll() is None)
        second = run(*arguments)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert second.stderr.count("error: ") == 1 and "another run is writing to it" in second.stderr
    third = run(*small_run(*inputs, tmp_path / "out", steps=1), "--resume_from_checkpoint", "latest")
    assert third.returncode == 0, third.stderr
