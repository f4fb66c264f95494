"""Weights that train in fp32 whatever the model computes in, and their export."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from longlora_ext._folders import is_first_process


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


def fp32_state(model: nn.Module, only_trainable: bool) -> dict[str, torch.Tensor]:
    """
    The fp32 weights under their full names, on the CPU of the first process (elsewhere empty). A tied weight
    is one tensor under all its names. Collective under ZeRO.
    """
    state: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if only_trainable and not parameter.requires_grad:
            continue
        if id(parameter) not in seen:
            weight = fp32_weight(parameter)
            seen[id(parameter)] = weight.cpu() if is_first_process() else weight.new_empty(0)
        state[name] = seen[id(parameter)]
    return state if is_first_process() else {}


def fp32_weight(parameter: torch.Tensor) -> torch.Tensor:
    """The whole weight in fp32: DeepSpeed's master if it keeps one, as the weight may be a rounding of it."""
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
    """The shape of the weight that ZeRO-3 may have cut up."""
    return getattr(parameter, "ds_shape", parameter.shape)
