"""Models of which each process holds a part of the weights: under ZeRO-3 and FSDP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of the weights is with other processes."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return _is_zero3(model) or any(isinstance(weight, DTensor) for weight in model.parameters())


def _is_zero3(model: nn.Module) -> bool:
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs."""
    if not _is_zero3(model):
        return next(model.parameters()).device
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())  # the weights may wait in the host's memory


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Let forward passes of a ZeRO-3 model gather its weights, a layer's at a time, where DeepSpeed does not yet.

    It does once `deepspeed.initialize` has prepared the model; one that was only loaded has parts of weights. Models
    of any other kind are left alone.
    """
    if not _is_zero3(model) or hasattr(model, "optimizer"):  # an engine's
        yield
        return
    import deepspeed

    entered: dict[nn.Module, ExitStack] = {}
    handles = []

    def enter(module: nn.Module, args: Any) -> None:
        entered[module] = ExitStack()
        entered[module].enter_context(deepspeed.zero.GatheredParameters(blocks[module]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop(module).close()

    blocks = {module: list(weights) for module, weights in _blocks(model)}
    try:
        for module in blocks:
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for stack in entered.values():  # a forward pass that failed
            stack.close()


def _blocks(module: nn.Module) -> Iterator[tuple[nn.Module, Iterator[nn.Parameter]]]:
    """Modules with the weights to gather for them: each layer whole, as it may use those of its parts by itself."""
    if own := list(module.parameters(recurse=False)):
        yield module, iter(own)
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from ((layer, layer.parameters()) for layer in child)
        else:
            yield from _blocks(child)
