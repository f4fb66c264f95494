"""What both ways to attend over ranks do first: look at the arguments, and have all ranks agree on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longlora_ext._arguments import LARGEST_SCALE, Arguments, check_arguments, in_autocast, with_defaults
from longlora_ext._kernels import why_unsupported, with_head_dim
from longlora_ext.parallel._agreement import agree

__all__ = ["Call", "prepare"]


@dataclass(frozen=True)
class Call:
    """A call that all ranks make.

    Attributes:
        tensors: q, k and v, in the dtype to compute in, with one head dim: zeros behind the smaller one.
        head_dim: That of the values, and of the result.
        group: The ranks.
        first_shifted_head: With its default filled in.
        scale: Likewise.
        positions: For each rank the place of its first row in its document, in each sequence of the batch.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    head_dim: int
    group: dist.ProcessGroup
    first_shifted_head: int
    scale: float
    positions: tuple[tuple[int, ...], ...]


def prepare(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    position_ids: Tensor,
    group: dist.ProcessGroup | None,
    first_shifted_head: int | None,
    window: int | None,
    sink: bool,
    scale: float | None,
    *,
    by_kernels: bool,
) -> Call:
    """Check a call of the function `name` on all ranks, which attends `by_kernels` of this package or not at all.

    Collective.

    Raises:
        ValueError: On all ranks, if an argument of one does not fit, or they do not fit each other.
    """
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError(f"{name}: there is no process group: call torch.distributed.init_process_group before")
    q, k, v = in_autocast(q, k, v)
    of_scores, of_values = q.shape[-1], v.shape[-1]
    if q.dim() == v.dim() == 4 and of_scores == k.shape[-1]:  # otherwise an error
        q, k, v = with_head_dim(max(of_scores, of_values), q, k, v)
    error = _why_not(q, k, v, group_size, position_ids, first_shifted_head, window, scale)
    if error is None and by_kernels and (reason := why_unsupported(q.device, q.dtype, q.shape[3])):
        error = f"there is no kernel, and only ulysses_s2attn can do without: {reason}"
    shared: dict[str, object] = {}
    if error is None:
        first_shifted_head, scale = with_defaults(q[..., :of_scores], first_shifted_head, scale)
        shared = {
            "seqlen": q.shape[1],
            "batch": q.shape[0],
            "heads": q.shape[2],
            "kv_heads": k.shape[2],
            "head_dim": (of_scores, of_values),
            "dtype": str(q.dtype),
            "group_size": group_size,
            "first_shifted_head": first_shifted_head,
            "window": window,
            "sink": sink,
            "scale": scale,
            "sequences of position_ids": position_ids.shape[0],
        }
    positions = agree(name, error, shared, position_ids, group)
    assert first_shifted_head is not None and scale is not None
    return Call((q, k, v), of_values, group, first_shifted_head, scale, positions)


def _why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    position_ids: Tensor,
    first_shifted_head: int | None,
    window: int | None,
    scale: float | None,
) -> str | None:
    """What is wrong with a rank's arguments by themselves."""
    if q.dim() != 4 or 0 in q.shape:
        return f"q must be [batch, seqlen, heads, head_dim] and hold something, but is {list(q.shape)}"
    if not isinstance(group_size, int):
        return f"group_size must be a positive even integer, but is {group_size!r}"
    if not (scale is None or abs(scale) <= LARGEST_SCALE):  # NaN is not
        return f"scale must be finite and at most {LARGEST_SCALE:g}, but is {scale}"
    try:
        check_arguments(q, k, v, Arguments(group_size, first_shifted_head or 0, window=window))
    except RuntimeError as error:
        return str(error).removeprefix("s2attn: ")
    batch, length = q.shape[:2]
    if k.shape[1] != length:
        return f"k and v must have q's seqlen, but q is {list(q.shape)} and k {list(k.shape)}"
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        return f"position_ids must be [{batch}, {length}] or [1, {length}], but are {list(position_ids.shape)}"
    if position_ids.dtype not in (torch.int32, torch.int64):
        return f"position_ids must be int32 or int64, but are {position_ids.dtype}"
    return None
