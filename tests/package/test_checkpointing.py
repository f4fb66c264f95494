"""Activation checkpointing by the options of the installed transformers: the same gradients from less that is kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from transformers import HfArgumentParser, TrainingArguments

from app.training.recipe import CHECKPOINTING, RECIPE
from longlora_ext.adapter import lora_config, prepare_model
from op_checks import default_dtype
from tiny_models import deterministic, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("device")
ENABLE = f"{CHECKPOINTING}_enable"


def gradients(kept_by: AbstractContextManager, **how: Any) -> dict[str, torch.Tensor]:
    """The gradients of an adapter; `kept_by` sees or keeps what the forward pass leaves for the backward one."""
    model = tiny_model(dtype=default_dtype())
    if how:
        getattr(model, ENABLE)(**how)
    model = prepare_model(model, lora_config(model)).train()
    ids = tokens(2, 24)
    with deterministic():
        with kept_by:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same(reentrant: bool) -> None:
    sizes: list[list[int]] = [[], []]
    hooks = [saved_tensors_hooks(lambda t, s=s: s.append(t.nbytes) or t, lambda t: t) for s in sizes]
    expected = gradients(hooks[0])
    assert_same(gradients(hooks[1], **{f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}), expected)
    assert sum(sizes[1]) < 0.6 * sum(sizes[0])


def test_what_is_kept_may_go_to_host_memory() -> None:
    """As `offload` of transformers has it, which wants a GPU: here what is kept is copied within host memory."""
    expected = gradients(nullcontext())
    assert_same(gradients(save_on_cpu(), **{f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}), expected)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.only("cpu", "no tensor is made")
def test_the_recipe_is_understood_by_the_installed_transformers(tmp_path) -> None:
    """By the option's current name, which a newer transformers may deprecate."""
    given = {name: RECIPE[name] for name in (CHECKPOINTING, f"{CHECKPOINTING}_kwargs")}
    words = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        [*words, "--output_dir", str(tmp_path), "--use_cpu"]
    )
    assert getattr(args, CHECKPOINTING) is True
    assert getattr(args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": False}
