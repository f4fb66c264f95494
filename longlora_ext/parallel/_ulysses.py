"""Attention on rows that several processes share, where each gets all of them, of some of the heads (Ulysses).

The way of https://arxiv.org/abs/2309.14509: before the attention ranks exchange tokens for heads, and behind it heads
for tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longlora_ext.ops import s2attn
from longlora_ext.parallel._agreement import kept
from longlora_ext.parallel._call import prepare
from longlora_ext.parallel._exchange import told

__all__ = ["attend_by_heads", "ulysses_s2attn", "why_not_ulysses"]

_doc_starts: Any = WeakTensorKeyDictionary()


def why_not_ulysses(heads: int, kv_heads: int, ranks: int) -> str | None:
    """Why so many ranks cannot share these heads, in words; `None` if they can."""
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        return f"{ranks} ranks do not divide {heads} query heads and {kv_heads} key and value heads"
    return None


@torch.compiler.disable
def ulysses_s2attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    position_ids: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    first_shifted_head: int | None = None,
    window: int | None = None,
    sink: bool = False,
    scale: float | None = None,
    deterministic: bool = False,
) -> Tensor:
    """`longlora_ext.s2attn` on sequences that the processes of a group share, by the exchange of tokens for heads.

    It moves all of q, k, v and the result, whatever a row sees, so that it suits dense attention (`group_size >= N` and
    `first_shifted_head=H`); `halo_s2attn` moves less where groups are short. The number of ranks divides H, and divides
    Hkv or is a multiple of it.

    Args:
        q: As for `halo_s2attn`, like all others, but of any D and floating dtype.
        k: Likewise.
        v: Likewise.
        group_size: Likewise.
        position_ids: Likewise.
        group: Likewise.
        first_shifted_head: Likewise, counted among all H heads.
        window: Likewise.
        sink: Likewise.
        scale: Likewise.
        deterministic: Likewise.

    Returns:
        [B, L, H, D], contiguous, dtype of `q` (of autocast, under that).

    Raises:
        ValueError: As for `halo_s2attn`, and if the heads do not divide.
        RuntimeError: As for `halo_s2attn`.
    """
    arguments = (q, k, v, group_size, position_ids, group, first_shifted_head, window, sink, scale)
    call = prepare("ulysses_s2attn", *arguments, by_kernels=False)
    q, k, v = call.tensors
    if reason := why_not_ulysses(q.shape[2], k.shape[2], len(call.positions)):
        raise ValueError(f"ulysses_s2attn: {reason}")
    out = attend_by_heads(
        (q, k, v),
        dist.get_rank(call.group),
        len(call.positions),
        lambda x: _Swap.apply(x, call.group),
        group_size=group_size,
        doc_start=_doc_start(position_ids, call.group).expand(q.shape[0], -1),
        first_shifted_head=call.first_shifted_head,
        window=window,
        sink=sink,
        scale=call.scale,
        deterministic=deterministic,
    )
    return out if out.shape[3] == call.head_dim else out[..., : call.head_dim].contiguous()


def attend_by_heads(
    tensors: tuple[Tensor, Tensor, Tensor],
    rank: int,
    ranks: int,
    swap: Callable[[Tensor], Tensor],
    *,
    first_shifted_head: int,
    **pattern: Any,
) -> Tensor:
    """The attention of one of several ranks, of which `swap` sends x[r] to rank r and returns what they sent.

    Args:
        tensors: q [B, L, H, D], k and v [B, L, Hkv, D].
        rank: Which.
        ranks: Of how many.
        swap: From [ranks, ...] to the same shape.
        first_shifted_head: Among all H heads.
        pattern: What else `s2attn` takes, for all rows.

    Returns:
        [B, L, H, D].
    """
    q, k, v = tensors
    repeats = max(1, ranks // k.shape[2])  # fewer heads of keys than ranks: several get the same
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v)) if repeats > 1 else (k, v)
    part = q.shape[2] // ranks
    by_rank = [x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4) for x in (q, k, v)]
    received = swap(torch.cat(by_rank, dim=3))  # [ranks, B, L, heads of one, D]
    sizes = [x.shape[3] for x in by_rank]
    rows = received.transpose(0, 1).flatten(1, 2).split(sizes, dim=2)
    out = s2attn(*rows, first_shifted_head=min(max(first_shifted_head - rank * part, 0), part), **pattern)
    back = swap(out.unflatten(1, (ranks, -1)).transpose(0, 1))
    return back.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Swap(torch.autograd.Function):
    """What is at [r] goes to rank r, and what rank r sent comes to [r]: its own reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        sent = x.contiguous()
        received = torch.empty_like(sent)
        with told(group):
            dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Swap.apply(grads[0], ctx.group), None


def _doc_start(position_ids: Tensor, group: dist.ProcessGroup) -> Tensor:
    """int32 [B or 1, N] of all ranks' rows, asked for once for each tensor of positions."""
    known = kept(_doc_starts, position_ids)
    if group not in known:
        parts = [torch.empty_like(position_ids) for _ in range(dist.get_world_size(group))]
        with told(group):
            dist.all_gather(parts, position_ids.contiguous(), group=group)
        places = torch.cat(parts, dim=1)
        known[group] = (torch.arange(places.shape[1], device=places.device) - places).to(torch.int32)
    return known[group]
