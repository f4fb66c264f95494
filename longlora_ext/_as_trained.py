"""Forward passes of a model as it is trained, which leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Training mode without dropout, whose numbers would depend on the tokens, and without activation checkpointing,
    which not every way to compute gradients goes with."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    checkpointing = [module for module in modules if getattr(module, "gradient_checkpointing", False) is True]
    try:
        model.train()
        for module in modules:
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.train(False)
        for module in checkpointing:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The same random numbers for every forward pass, and no trace of it: not in buffers either."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gpus = {weight.device for weight in model.parameters() if weight.device.type not in ("cpu", "meta")}
    kind = next(iter(gpus)).type if gpus else "cuda"
    try:
        with torch.random.fork_rng([gpu.index or 0 for gpu in gpus], device_type=kind):
            yield
    finally:
        for buffer, kept in buffers:
            buffer.data.copy_(kept)  # what a backward pass needs of it counts as unchanged


@contextmanager
def setting(config: Any, name: str, value: Any) -> Iterator[None]:
    """Give a field of a config a value for as long as the context lasts."""
    there = name in vars(config)
    own = getattr(config, name, None)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, own) if there else delattr(config, name)
