"""Runs that are killed, and go on from their checkpoints."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import finetune_runs
import merge_adapter
from app.runs.checkpoints import complete_checkpoints
from app.training.steps import steps_of
from finetune_runs import environment, losses, run, small_run
from patience import patience, wait_until
from same_run import assert_same_run

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "killed_run.py"


@pytest.fixture(scope="module")
def undisturbed(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run(*small_run(*inputs, output))
    assert done.returncode == 0, done.stderr
    return output


def killed(point: int | Path, arguments: list[str]) -> str | None:
    """Run until the kill; returns where that was, or None if the run came to its end. `point`: see the helper."""
    command = [sys.executable, str(HELPER), str(point), *arguments]  # it comes before what imports torch.save
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
    """The second of two saves, which also deletes the first one's checkpoint, from what a kill at each point leaves."""
    limit = ["--resume_from_checkpoint", "latest", "--save_total_limit", "1"]
    first = [*small_run(*inputs, tmp_path / "first", steps=2), *limit]
    whole = [*small_run(*inputs, tmp_path / "whole", steps=4), *limit]
    for arguments in (first, whole):
        assert run(*arguments).returncode == 0
    shutil.copytree(tmp_path / "first", tmp_path / "out")
    copies = tmp_path / "copies"
    assert killed(copies, [*small_run(*inputs, tmp_path / "out", steps=4), *limit]) is None
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    places = {path.with_suffix(""): path.read_text() for path in copies.glob("*.txt")}
    for output, where in places.items():
        complete = complete_checkpoints(output)
        assert complete and set(complete) <= {2, 4}, where
        done = run(*small_run(*inputs, output, steps=4), *limit)
        assert done.returncode == 0, f"{where}: {done.stderr}"
        assert f"going on from checkpoint-{max(complete)}" in done.stdout
        assert_same_run(output, tmp_path / "whole")
    for file in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth"):
        assert any("half of" in where and where.endswith(f"checkpoint-4/{file}") for where in places.values()), places
    assert any("checkpoint-2" in where for where in places.values()), places


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


def test_fewer_steps_than_are_done_are_an_error(undisturbed: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Before anything is written: the adapter of six steps is not called one of four."""
    output = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    before = (output / "run.json").read_text()
    done = run(*small_run(*inputs, output, steps=4), "--resume_from_checkpoint", "latest")
    assert done.returncode == 2 and "checkpoint-6 is of step 6, and this run is to have 4: give more" in done.stderr
    assert (output / "run.json").read_text() == before


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


def test_passes_that_are_over_are_not_gone_on_with(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Where the last one ends in the middle of the text."""
    given = [*small_run(*inputs, tmp_path / "out", steps=-1), "--num_train_epochs", "0.15", "--eval_tokens", "0"]
    assert (done := run(*given)).returncode == 0, done.stderr
    steps = sorted(losses(tmp_path / "out"))
    done = run(*given, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0 and "'loss':" not in done.stdout, done.stderr
    assert sorted(losses(tmp_path / "out")) == steps


@pytest.mark.parametrize("accumulation, batch, drop_last", [(1, 1, False), (4, 2, False), (3, 2, True), (50, 1, False)])
def test_steps_are_counted_as_the_trainer_counts_them(
    tmp_path: Path, accumulation: int, batch: int, drop_last: bool
) -> None:
    for epochs, most in ((1.5, -1), (0.2, -1), (3, -1), (3, 7)):
        args = TrainingArguments(
            str(tmp_path), num_train_epochs=epochs, max_steps=most, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=batch, dataloader_drop_last=drop_last, use_cpu=True, report_to=[],
        )  # fmt: skip
        for rows in (4, 17, 40):
            trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=[{"x": 0}] * rows)  # type: ignore[arg-type]
            *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
            assert steps_of(args, rows, 1) == steps


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
    done = [int(path.parent.name.split("-")[1]) for path in tmp_path.glob("out/checkpoint-*/complete.json")]
    steps = max(done, default=1)
    third = run(*small_run(*inputs, tmp_path / "out", steps=steps), "--resume_from_checkpoint", "latest")
    assert third.returncode == 0, third.stderr
