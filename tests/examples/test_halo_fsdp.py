"""The loop to copy for sequences that processes share (examples/halo_fsdp.py)."""

from __future__ import annotations

import pytest

import forks
from finetune_runs import ROOT, environment

SCRIPT = ROOT / "examples" / "halo_fsdp.py"


def losses(processes: int) -> list[float]:
    done = forks.run([SCRIPT], environment(), processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]


def test_two_processes_train_as_one() -> None:
    alone, together = losses(1), losses(2)
    assert len(alone) == 4 and alone[3] != alone[0]
    assert together == pytest.approx(alone, abs=2e-5)


def test_it_is_short() -> None:
    lines = [line for line in SCRIPT.read_text(encoding="utf-8").split('"""', 2)[2].splitlines() if line.strip()]
    assert len(lines) <= 60
