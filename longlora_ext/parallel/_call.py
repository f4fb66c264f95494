"""What both ways to attend over ranks do first: look at the arguments, and have all ranks agree on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longlora_ext._arguments import LARGEST_SCALE
from longlora_ext._kernels import why_unsupported
from longlora_ext.parallel._agreement import agree

__all__ = ["Call", "prepare"]


@dataclass(frozen=True)
class Call:
    """A call that all ranks make.

    Attributes:
        tensors: q, k and v, in the dtype to compute in.
        group: The ranks.
        first_shifted_head: With its default filled in.
        scale: Likewise.
        positions: For each rank the place of its first row in its document, in each sequence of the batch.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
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
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    error = _why_not(q, k, v, group_size, position_ids, first_shifted_head, window, scale)
    if error is None and by_kernels and (reason := why_unsupported(q.device, q.dtype, q.shape[3])):
        error = f"there is no kernel, and only ulysses_s2attn can do without: {reason}"
    shared: dict[str, object] = {}
    if error is None:
        scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
        first_shifted_head = q.shape[2] // 2 if first_shifted_head is None else first_shifted_head
        shared = {
            "seqlen": q.shape[1],
            "batch": q.shape[0],
            "heads": q.shape[2],
            "kv_heads": k.shape[2],
            "head_dim": q.shape[3],
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
    return Call((q, k, v), group, first_shifted_head, scale, positions)


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
    batch, length, heads, head_dim = q.shape
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != head_dim or not k.shape[2] or heads % k.shape[2]:
        return (
            f"k must be [{batch}, {length}, kv_heads, {head_dim}] with kv_heads dividing {heads}, not {list(k.shape)}"
        )
    if v.shape != k.shape or not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        return f"v must be like k, {list(k.shape)} of q's dtype {q.dtype}, but is {list(v.shape)} of {v.dtype}"
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2 or group_size % 2:
        return f"group_size must be a positive even integer, but is {group_size!r}"
    if not (first_shifted_head is None or 0 <= first_shifted_head <= heads):
        return f"first_shifted_head must be from 0 to {heads}, but is {first_shifted_head}"
    if not (window is None or window >= 1):
        return f"window must be 1 or more, but is {window}"
    if not (scale is None or abs(scale) <= LARGEST_SCALE):  # NaN is not
        return f"scale must be finite and at most {LARGEST_SCALE:g}, but is {scale}"
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        return f"position_ids must be [{batch}, {length}] or [1, {length}], but are {list(position_ids.shape)}"
    if position_ids.dtype not in (torch.int32, torch.int64):
        return f"position_ids must be int32 or int64, but are {position_ids.dtype}"
    return None
