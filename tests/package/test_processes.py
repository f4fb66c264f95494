"""What processes decide together: one acts, all know, and if one fails all do (longlora_ext/_processes.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from longlora_ext._processes import (
    fail_together,
    first_process_first,
    is_first_process,
    on_first_process,
    wait_for_all,
)


class Unsendable(Exception):
    """Which cannot be made again from its text."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")


def failing(error: Exception) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def raised(call: Callable[[], object]) -> str:
    try:
        return f"returned {call()!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def work(rank: int, folder: str) -> None:
    """One of two processes. What each found is in a file of its own; a process that hung would find nothing."""
    os.environ["LOCAL_RANK"] = str(rank)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    seen = Path(folder) / "seen"
    missing = Path(folder) / "missing"

    def read() -> bool:
        """Whether it was read before, and from then on it was."""
        was = seen.exists()
        seen.touch()
        return was

    def fail_on_second() -> int:
        if rank == 1:
            raise OSError(28, "No space left on device")
        return 1

    calls = {
        "decided": lambda: on_first_process(lambda: {"rank": dist.get_rank()}),
        "nothing": lambda: on_first_process(lambda: None),
        "refused": lambda: on_first_process(failing(ValueError("a bad folder"))),
        "missing": lambda: on_first_process(missing.read_text),
        "unsendable": lambda: on_first_process(failing(Unsendable(3, "no room"))),
        "unpickled": lambda: on_first_process(lambda: open(os.devnull)),  # noqa: SIM115
        "cache": lambda: first_process_first(read),
        "first fails": lambda: first_process_first(failing(ValueError("no text"))),
        "second fails": lambda: first_process_first(fail_on_second),
        "together": lambda: fail_together(ValueError("mine") if rank == 1 else None),
        "after all that": lambda: on_first_process(lambda: 1),
    }
    found = [f"{name}: {raised(call)}" for name, call in calls.items()]
    wait_for_all()
    (Path(folder) / f"found-{rank}").write_text("\n".join(found))
    dist.destroy_process_group()


def test_two_processes_do_and_fail_alike(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    found = [
        dict(line.split(": ", 1) for line in (tmp_path / f"found-{rank}").read_text().splitlines()) for rank in (0, 1)
    ]
    alike = {
        "decided": "returned {'rank': 0}",
        "nothing": "returned None",
        "refused": "ValueError: a bad folder",
        "missing": f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path / 'missing'}'",
        "unpickled": "TypeError: cannot pickle '_io.TextIOWrapper' object",
        "first fails": "ValueError: no text",
        "second fails": "OSError: [Errno 28] No space left on device",
        "together": "ValueError: mine",
        "after all that": "returned 1",
    }
    for one in found:
        assert {name: one[name] for name in alike} == alike
    assert [one["cache"] for one in found] == ["returned False", "returned True"]
    assert found[0]["unsendable"] == "Unsendable: no room (3)"
    assert found[1]["unsendable"] == "RuntimeError: another process failed: Unsendable: no room (3)"


def test_alone_each_is_the_action_itself() -> None:
    assert is_first_process() and wait_for_all() is None
    assert on_first_process(lambda: 1) == first_process_first(lambda: 1) == 1
    error = Unsendable(3, "no room")
    for call in (on_first_process, first_process_first):
        with pytest.raises(Unsendable) as caught:
            call(failing(error))
        assert caught.value is error
    fail_together(None)
