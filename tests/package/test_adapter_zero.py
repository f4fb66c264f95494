"""Adapters under DeepSpeed and DDP: two processes on a CPU train for twenty steps, save and end well."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import forks
from finetune_runs import environment
from longlora_ext.adapter import load, lora_config, merge, prepare_model, save_adapter
from tiny_models import tokens
from tiny_training import began, extended_model, joined_batches, moved, save_base, train

WORKER = Path(__file__).resolve().parents[1] / "helpers" / "zero_worker.py"


def run(folder: Path, kind: str, *cases: str) -> None:
    """Start the workers, with the test environment's programs (ninja) to be found and one thread each."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = forks.run([WORKER, folder, kind, *cases], {**environment(), "PATH": path}, processes=2)
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


def check_same_as_alone(folder: Path, kind: str, case: str) -> None:
    """One process that sees both ranks' batches as one trains, saves and merges the same weights."""
    base = folder / case.removesuffix(".fp32")
    origins = load_file(base / "model.safetensors") | load_file(folder / f"{case}.lora_a")
    alone = extended_model(base, torch.float32)
    alone = prepare_model(alone, lora_config(alone))
    random_halves = {name.replace(".weight", ".default.weight"): origins[name] for name in origins if "lora_A" in name}
    assert not alone.load_state_dict(random_halves, strict=False).unexpected_keys
    train(alone, joined_batches())
    save_adapter(alone, folder / f"{case}.alone")
    for who in ("alone", kind):
        merge(folder / f"{case}.{who}", folder / f"{case}.{who}.merged", dtype="float32")
    for file in ("{}/adapter_model.safetensors", "{}.merged/model.safetensors"):
        expected, found = (load_file(folder / f"{case}.{file.format(who)}") for who in ("alone", kind))
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            distance = (weight - began(name, origins)).norm()
            # AdamW makes a whole step of the smallest gradient, and so more of its rounding than of others.
            assert (found[name] - weight).norm() <= 1e-3 * distance, (name, distance)


@pytest.mark.parametrize("kind", [pytest.param("zero2", marks=pytest.mark.full), "zero3"])
def test_every_saved_weight_has_moved_after_20_steps(kind: str, tmp_path: Path) -> None:
    cases = ["tied", "untied", "untied.full", "tied.fp32", "untied.fp32"]
    for name in ("tied", "untied"):
        save_base(tmp_path / name, tie_word_embeddings=name == "tied")
    run(tmp_path, kind, *cases)
    for case in cases:
        check(tmp_path, kind, case)
        if case.endswith(".fp32"):
            check_same_as_alone(tmp_path, kind, case)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["ddp", "zero3_offload"])
def test_other_ways_to_train_on_two_processes(kind: str, tmp_path: Path) -> None:
    save_base(tmp_path / "tied", tie_word_embeddings=True)
    cases = ["tied", "tied.full", "tied.fp32"]
    run(tmp_path, kind, *cases)
    for case in cases:
        check(tmp_path, kind, case)
    check_same_as_alone(tmp_path, kind, "tied.fp32")
