"""How far the vectors of tokens move when other tokens are changed, and which module of a model it begins in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def movement(before: Tensor, after: Tensor, changed: Tensor) -> Tensor:
    """How far each token's vector moved, as a share of how far those of changed tokens do (their median). What was not
    finite and is the same did not move.

    Args:
        before: [rows, tokens, ...].
        after: Likewise.
        changed: bool [rows, tokens]: whose input was changed.

    Returns:
        float64 [rows, tokens], on the CPU.
    """
    same = (after == before) | (after.isnan() & before.isnan())
    difference = (after.double() - before.double()).masked_fill(same, 0.0).nan_to_num(nan=torch.inf)
    moved = difference.flatten(2).norm(dim=-1).cpu()
    return (moved / moved[changed].median().clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num(nan=torch.inf)


def largest(values: Tensor, where: Tensor) -> float:
    """The largest of some values, 0 if there are none."""
    return values[where].max().item() if bool(where.any()) else 0.0


def where_it_begins(
    model: nn.Module, run_before: Callable[[], Any], run_after: Callable[[], Any], changed: Tensor, row: int
) -> str:
    """The first module that moves tokens of a row which were not changed, while its inputs there stay as they are.

    Args:
        model: What is run.
        run_before: Runs it on inputs of [rows, tokens], without changes.
        run_after: Runs it on those inputs with changes.
        changed: bool [rows, tokens]: whose input was changed.
        row: The row to look at.

    Returns:
        Name and class, innermost first; empty if there is no such module.
    """
    kept: list[tuple[list[Tensor], list[Tensor]]] = []
    found: list[tuple[float, str]] = []
    here = torch.zeros_like(changed)
    here[row] = ~changed[row]

    def per_token(values: Any) -> list[Tensor]:
        tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_floating_point())
        return [tensor.detach().clone() for tensor in tensors if tensor.shape[:2] == changed.shape]

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        kept.append((per_token((args, kwargs)), per_token(output)))

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        sides = zip(kept[len(calls)], (per_token((args, kwargs)), per_token(output)), strict=True)
        calls.append(module)
        taken, given = (
            max((largest(movement(b, a, changed), here) for b, a in zip(*side, strict=False)), default=0.0)
            for side in sides
        )
        if taken < 0.1 * given:
            found.append((given, f"{names[module]} ({type(module).__name__})"))

    calls: list[nn.Module] = []
    names = {module: name.removeprefix("base_model.model.") for name, module in model.named_modules() if name}
    for run, hook in ((run_before, keep), (run_after, compare)):
        handles = [module.register_forward_hook(hook, with_kwargs=True) for module in names]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
    most = max((share for share, _ in found), default=0.0)
    return next((name for share, name in found if share >= 0.1 * most), "")  # the rest is rounding
