"""What tests of merging share: bases, adapters whose weights are random, and how much memory something takes."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from longlora_ext.adapter import load, lora_config, prepare_model, save_adapter
from tiny_models import tokens
from tiny_training import extended_model, save_base


def fp32_base(folder: Path, family: str = "llama", **changes: object) -> Path:
    """A base model in fp32, so that equal is equal, in several files."""
    save_base(folder, family, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    return folder


def save_random_adapter(base: Path, folder: Path, **overrides: object) -> Path:
    """An adapter that changes everything that it can, without a training."""
    model = extended_model(base, torch.float32)
    model = prepare_model(model, lora_config(model, **overrides))
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
    save_adapter(model, folder)
    return folder


def assert_same_logits(adapter: Path, merged: Path, base: Path) -> None:
    with torch.no_grad():
        ids = tokens(2, 150)
        want = load(adapter, dtype=torch.float32)(ids).logits
        have = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
        before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    assert (have - before).abs().max() > 0.1


def peak_while(action) -> int:  # type: ignore[no-untyped-def]
    """Bytes by which the process grows at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size
    before = peak()
    action()
    return peak() - before


def peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can grow beyond that: a weight file finds the disk full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
