"""How processes of the trainer end and get ready (examples/app/runs/launch.py)."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from app.runs import launch


def test_a_process_that_fails_alone_speaks_after_the_first_had_its_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said_while_waiting = []
    monkeypatch.setattr(launch, "RANK", 3)
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: said_while_waiting.append(capsys.readouterr().err))
    with pytest.raises(SystemExit) as stopped:
        launch.fail("no room")
    assert stopped.value.code == 2
    assert said_while_waiting == [""]
    assert capsys.readouterr().err == "finetune_llama.py: error: process 3: no room\n"


def test_threads_get_pythons_lock_before_the_group_is_taken_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of gloo's does that lets go of a tensor. Nobody has to give the lock away within this minute. The moment
    that is left for it is as long here as a busy machine makes it."""
    go, let_go, seen = threading.Event(), [], []
    thread = threading.Thread(target=lambda: (go.wait(), let_go.append("tensor")))
    thread.start()
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: thread.join())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: seen.extend(let_go))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        go.set()
        launch.leave_group()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert seen == ["tensor"]


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, "python"),
        ({"WORLD_SIZE": "1"}, "python"),
        ({"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}, "torchrun --nproc_per_node 8"),
        (
            {"WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2"},
            "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT",
        ),
        ({"WORLD_SIZE": "8", "CROSS_RANK": "0", "CROSS_SIZE": "1"}, "deepspeed --num_accelerators 8"),
        ({"WORLD_SIZE": "12", "CROSS_RANK": "1", "CROSS_SIZE": "2"}, "deepspeed --hostfile HOSTFILE"),
    ],
)
def test_the_launcher_is_told_from_what_it_sets(environment: dict[str, str], command: str) -> None:
    assert launch.launcher(environment) == command


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """DeepSpeed's op builder replaced by one that only counts, the cache below `tmp_path`, and the loads of it."""
    loads: list[str] = []
    builder = SimpleNamespace(is_compatible=lambda: True, load=lambda verbose: loads.append("loaded"))
    deepspeed, accelerator = ModuleType("deepspeed"), ModuleType("deepspeed.accelerator")
    deepspeed.__version__ = "0"  # type: ignore[attr-defined]
    accelerator.get_accelerator = lambda: SimpleNamespace(  # type: ignore[attr-defined]
        create_op_builder=lambda name: builder
    )
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setitem(sys.modules, "deepspeed.accelerator", accelerator)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that what is set below is undone afterwards
    monkeypatch.setenv("PATH", launch.os.environ["PATH"])
    return loads


def lock(folder: Path) -> Path:
    (folder / "op").mkdir(parents=True)
    (folder / "op" / "lock").touch()
    return folder / "op" / "lock"


def test_locks_of_others_are_left_alone(loads: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    users = lock(tmp_path / "users")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "users"))
    launch._compile_communication_op()
    assert loads == ["loaded"] and users.exists()


def test_a_leftover_lock_in_our_own_folder_is_removed(
    loads: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    launch._compile_communication_op()
    (folder,) = (tmp_path / "longlora_ext").iterdir()
    leftover = lock(folder)
    launch._compile_communication_op()  # the variable is set by now, to that very folder
    assert loads == ["loaded"] * 2 and not leftover.exists()


def test_a_compiler_may_be_a_command_of_several_words(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch, which quotes CXX, gets one program that runs the command."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("CXX", "env printf '%s;'")
    launch._compile_communication_op()
    assert loads == ["loaded"]
    done = subprocess.run([launch.os.environ["CXX"], "a b", "c"], capture_output=True, text=True)
    assert done.stdout == "a b;c;"


def test_a_compiler_that_is_not_there_is_named(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "nowhere-g++ -O2")
    with pytest.raises(ImportError, match=r"^nowhere-g\+\+ not found: on a CPU DeepSpeed compiles"):
        launch._compile_communication_op()
    assert loads == []
