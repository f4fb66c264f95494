"""Weights that train in fp32 whatever the model computes in, and their export."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from longlora_ext._processes import is_first_process


def train_in_fp32(module: nn.Module, dtype: torch.dtype) -> None:
    """Make its weights fp32, and let it take and give activations in `dtype`, with and without autocast."""
    for parameter in module.parameters():
        parameter.data = parameter.data.float()  # in place: a tied weight stays one parameter
    for part in module.modules():
        if dtype != torch.float32 and next(part.parameters(recurse=False), None) is not None:
            # A matrix product wants one dtype, and so does LayerNorm on a GPU; a lookup or an RMSNorm does not.
            if isinstance(part, (nn.Linear, nn.LayerNorm)):
                part.register_forward_pre_hook(_cast_input)
            part.register_forward_hook(functools.partial(_cast_output, dtype=dtype))


def _cast_input(module: nn.Linear | nn.LayerNorm, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].to(module.weight.dtype),)


def _cast_output(module: nn.Module, args: Any, output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return output.to(dtype)


def fp32_state(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Weights by name, in fp32 on the CPU of the first process (elsewhere empty). A tied weight is one tensor
    under all its names. Collective under ZeRO and FSDP, which gather one weight at a time.
    """
    state: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    for name, parameter in weights:
        if id(parameter) not in seen:
            weight = fp32_weight(parameter).contiguous()  # PEFT ties the factors of a tied weight as transposes
            seen[id(parameter)] = weight.cpu() if is_first_process() else weight.new_empty(0)
        state[name] = seen[id(parameter)]
    return state if is_first_process() else {}


def give_back_gathered(model: nn.Module) -> None:
    """Let FSDP free what it has gathered for a forward pass: roundings of the sharded weights, to be read instead.

    Raises:
        ValueError: It is the first version of FSDP, which keeps no weight for itself.
    """
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                "the model is sharded by FullyShardedDataParallel, the first version of FSDP, whose weights cannot be "
                "gathered one by one: shard it with torch.distributed.fsdp.fully_shard"
            )
        if isinstance(module, FSDPModule):
            module.reshard()


#: What wrappers put into the names of the weights below them: activation checkpointing, and torch.compile of a layer.
_OF_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


def plain_name(name: str) -> str:
    """The full name of a weight in a model none of whose layers is wrapped."""
    return ".".join(part for part in name.split(".") if part not in _OF_WRAPPERS)


def fp32_weight(parameter: torch.Tensor) -> torch.Tensor:
    """The whole weight in fp32: DeepSpeed's master if it keeps one, as the weight may be a rounding of it."""
    if isinstance(parameter, DTensor):  # where it is in the host's memory, the processes may only meet on their GPUs
        shard: Any = parameter.detach().to(parameter.device_mesh.device_type)
        return shard.full_tensor().float()
    is_zero3 = hasattr(parameter, "ds_id")
    if not is_zero3 and not hasattr(parameter, "_hp_mapping"):
        return parameter.detach().float()
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if not is_zero3 or (parameter.requires_grad and hasattr(parameter, "_z3_optimizer")):
        master = safe_get_full_fp32_param(parameter)
        return master.detach().float().reshape(whole_shape(parameter))
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().float().clone()


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the weight that ZeRO-3 may have cut up; of FSDP's shards it is their own."""
    return getattr(parameter, "ds_shape", parameter.shape)
