"""Runs that cannot go on: the disk is full, or one of their processes dies. What was complete is left whole."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from traceback import StackSummary

import psutil
import pytest
from torch.distributed.checkpoint import CheckpointException

import finetune_llama
from app.runs.checkpoints import complete_checkpoints, find_resumable
from app.runs.full_disk import writing_to
from app.training import trainer
from finetune_runs import SCRIPT, deepspeed, environment, losses, small_run, torchrun
from patience import patience, wait_until


@pytest.fixture(scope="module")
def undisturbed(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    finetune_llama.main(small_run(*inputs, output))
    return output


#: What is larger than so many bytes does not fit: by the weights (safetensors), by the optimizer's state (torch).
@pytest.mark.parametrize(("step", "room"), [(2, 4096), (4, 90_000), (6, 4096)])
def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_when_there_is_room(
    inputs: tuple[Path, Path], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], step: int, room: int,
) -> None:  # fmt: skip
    """Files are limited in their size as soon as step 2, 4 or 6 is over and all of its checkpoint is there."""

    class ThenFull(trainer.CompletionMarker):
        def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            super().on_save(args, state, control, **kwargs)
            if state.global_step == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited))

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    arguments = [*small_run(*inputs, tmp_path / "out"), "--resume_from_checkpoint", "latest"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "CompletionMarker", ThenFull)
        try:
            with pytest.raises(SystemExit) as stopped:
                finetune_llama.main(arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    found = re.findall(
        r"error: .*/out cannot be written to: (.*)\. The run has stopped; complete checkpoints: (.*)\. ", said
    )
    names = ", ".join(f"checkpoint-{done}" for done in range(max(2, step - 2), step + 1, 2))
    assert [checkpoints for _, checkpoints in found] == [names] and "Traceback" not in said
    assert not (tmp_path / "out" / "adapter").exists()

    finetune_llama.main(arguments)
    assert f"going on from checkpoint-{step}" in capsys.readouterr().out
    assert losses(tmp_path / "out") == pytest.approx(losses(undisturbed), abs=1e-6)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_full_disk_behind_the_adapter_is_said(checkpoint: bool, tmp_path: Path, capsys) -> None:
    """There is nothing to go on with: what was advised would have been refused."""
    (tmp_path / "adapter").mkdir()
    if checkpoint:
        (tmp_path / "checkpoint-2").mkdir()
        (tmp_path / "checkpoint-2" / "complete.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"), writing_to(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = capsys.readouterr().err
    assert "adapter/ is complete, and what was to be measured of it is missing" in said
    assert ("go on with --resume_from_checkpoint latest" in said) == checkpoint


def test_a_full_disk_shows_in_a_sharded_checkpoint_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What torch raises on all processes of FSDP when one of them cannot write its shard."""
    with pytest.raises(SystemExit), writing_to(tmp_path):
        raise CheckpointException("write", {1: (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), StackSummary())})
    said = capsys.readouterr().err
    assert f"{tmp_path} cannot be written to: No space left on device. The run has stopped" in said
    with pytest.raises(CheckpointException), writing_to(tmp_path):
        raise CheckpointException("read", {1: (KeyError("weight"), StackSummary())})


def trainers(launcher: int) -> list[psutil.Process]:
    """The processes that a launcher gave a rank, in the order of the ranks; not what these start themselves."""

    def rank(process: psutil.Process | None) -> int | None:
        with suppress(psutil.NoSuchProcess):
            return int(process.environ()["RANK"]) if process and "RANK" in process.environ() else None
        return None

    ranks = {process: rank(process) for process in psutil.Process(launcher).children(recursive=True)}
    train = {process: of for process, of in ranks.items() if of is not None and rank(process.parent()) is None}
    return sorted(train, key=train.__getitem__)


@pytest.mark.parametrize("launcher", [torchrun, pytest.param(deepspeed, marks=pytest.mark.full)])
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.full)])
def test_when_a_process_dies_the_others_end_and_the_checkpoint_is_whole(
    inputs: tuple[Path, Path], tmp_path: Path, launcher: Callable[[int], tuple[str, ...]], rank: int
) -> None:
    output = tmp_path / "out"
    command = [*launcher(2), str(SCRIPT), *small_run(*inputs, output, steps=100_000), "--eval_tokens", "0"]
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment(), stdout=file, stderr=file, start_new_session=True)
    try:
        wait_until(lambda: complete_checkpoints(output), lambda: process.poll() is None)
        workers = trainers(process.pid)
        assert len(workers) == 2, workers
        workers[rank].kill()
        assert process.wait(timeout=patience()) != 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not any(worker.is_running() for worker in workers)
    newest = find_resumable("latest", output)
    assert newest is not None
    assert (newest / "optimizer.pt").is_file() or len(list(newest.glob("global_step*/*optim_states.pt"))) == 2
