"""Models sharded by torch's FSDP (`fully_shard`): their tiled loss, and what is saved of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from finetune_runs import environment, torchrun
from tiny_training import save_base

WORKER = Path(__file__).with_name("fsdp_worker.py")


@pytest.mark.parametrize("check", ["gradients", "saving", "first_version"])
def test_two_processes_share_a_model(check: str, tmp_path: Path) -> None:
    """What is checked is told by the functions of fsdp_worker.py."""
    for name in ("tied", "untied"):
        save_base(tmp_path / name, tie_word_embeddings=name == "tied")
    command = [*torchrun(2), str(WORKER), str(tmp_path), check]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
