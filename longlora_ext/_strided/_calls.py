"""Calls of torch's own attention: what it takes where, and which heads go into one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def is_fused(q: Tensor) -> bool:
    """Whether torch's attention does not form all scores there."""
    return q.device.type == "cpu" or (q.device.type in ("cuda", "xpu") and q.dtype != torch.float64)


def takes_gqa(q: Tensor) -> bool:
    """Whether it does so with fewer KV heads than query heads: FlashAttention does, on a GPU that has it."""
    if q.device.type == "cuda":
        if q.dtype not in (torch.bfloat16, torch.float16) or torch.version.hip or not torch.cuda.is_available():
            return False
        return torch.cuda.get_device_capability(q.device) >= (8, 0)
    return q.device.type == "cpu"


def halves(heads: int, kv_heads: int, first_shifted_head: int, gqa: bool) -> Iterator[tuple[slice, slice, bool]]:
    """Query heads, their KV heads, and whether they are shifted. Without `gqa` each has a KV head of its own."""
    each = heads // kv_heads
    if gqa and first_shifted_head % each == 0:
        cut, kv_cut = first_shifted_head, first_shifted_head * kv_heads // heads
        if cut:
            yield slice(0, cut), slice(0, kv_cut), False
        if cut < heads:
            yield slice(cut, heads), slice(kv_cut, kv_heads), True
        return
    for i in range(each):  # of the heads that share a KV head, the i-th
        still = len(range(i, first_shifted_head, each))
        if still:
            yield slice(i, first_shifted_head, each), slice(0, still), False
        if still < kv_heads:
            yield slice(i + each * still, heads, each), slice(still, kv_heads), True


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: Any) -> Tensor:
    options["enable_gqa"] = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, **options).transpose(1, 2)
