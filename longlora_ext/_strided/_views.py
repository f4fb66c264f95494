"""Views of a tensor whose gradients are summed in few tensors, and outputs that fill one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Cut(torch.autograd.Function):
    """Views of a tensor. Their gradients are summed in one tensor, in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: list[tuple[slice, ...]]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.dtype, ctx.places = x.shape, x.dtype, places
        ctx.set_materialize_grads(False)
        return tuple(x[place] for place in places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        known = [(place, grad) for place, grad in zip(ctx.places, grads, strict=True) if grad is not None]
        if not known:
            return None, None
        total = known[0][1].new_zeros(ctx.shape, dtype=torch.promote_types(ctx.dtype, torch.float32))
        for place, grad in known:
            total[place] += grad
        return total.to(ctx.dtype), None


class Take(torch.autograd.Function):
    """A view of a tensor, and the tensor, from which the next view is taken.

    Backwards, gradients are added to a sum that goes from the last view to the first, so that few exist at once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: tuple[slice, ...]) -> tuple[Tensor, Tensor]:
        ctx.shape, ctx.place = x.shape, place
        ctx.set_materialize_grads(False)
        return x[place], x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, total: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is not None:
            total = grad.new_zeros(ctx.shape) if total is None else total
            total[ctx.place] += grad
        return total, None


class Join(torch.autograd.Function):
    """Tensors written side by side into one, which they fill. Their gradients are views of its own."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], places: list[tuple[slice, ...]], *parts: Tensor) -> Tensor:
        ctx.places = places
        whole = parts[0].new_empty(shape)
        for place, part in zip(places, parts, strict=True):
            whole[place] = part
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(grad[place] for place in ctx.places))
