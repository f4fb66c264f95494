"""Adapters under DeepSpeed and DDP: two processes on a CPU train for twenty steps, save and end well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tokens
from tiny_training import moved, save_base

from longlora_ext.adapter import load

WORKER = Path(__file__).with_name("zero_worker.py")


def run(folder: Path, kind: str, *cases: str) -> None:
    """Start the workers, with the test environment's programs (ninja) to be found and one thread each."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder), kind, *cases],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "terminate called" not in done.stderr


def check(folder: Path, kind: str, case: str) -> None:
    """Everything trained has moved, and what was saved loads as the extended model."""
    base, full = load_file(folder / case.partition(".")[0] / "model.safetensors"), case.endswith(".full")
    saved = load_file(folder / f"{case}.{kind}" / ("model.safetensors" if full else "adapter_model.safetensors"))
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    parts = moved(saved, base if full else base | load_file(folder / f"{case}.lora_a"))
    assert len(parts) >= (20 if full else 22)
    for name, part in parts.items():
        assert part > 0.9, (name, part)
    model = load(folder / f"{case}.{kind}", dtype=torch.float32)
    assert model.config.rope_parameters["factor"] == 4.0 and model.config.s2attn_group_size == 64
    assert model(tokens(1, 150)).logits.isfinite().all()
    output, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (output.data_ptr() == embedding.data_ptr()) == case.startswith("tied")


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_every_saved_weight_has_moved_after_20_steps(kind: str, tmp_path: Path) -> None:
    cases = ["tied", "untied", "untied.full"]
    for name in ("tied", "untied"):
        save_base(tmp_path / name, tie_word_embeddings=name == "tied")
    run(tmp_path, kind, *cases)
    for case in cases:
        check(tmp_path, kind, case)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["ddp", "zero3_offload"])
def test_other_ways_to_train_on_two_processes(kind: str, tmp_path: Path) -> None:
    save_base(tmp_path / "tied", tie_word_embeddings=True)
    run(tmp_path, kind, "tied", "tied.full")
    check(tmp_path, kind, "tied")
    check(tmp_path, kind, "tied.full")
