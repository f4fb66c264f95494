"""What the operator computes, for torch's own counter (`torch.utils.flop_counter.FlopCounterMode`)."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def attended_pairs(tokens: int, group_size: int, heads: int, first_shifted_head: int) -> int:
    """(query, key) pairs of one sequence: each group of n tokens holds n (n + 1) / 2, a shifted head's first is half
    as long."""

    def pairs(first: int) -> int:
        first = min(first, tokens)
        whole, rest = divmod(tokens - first, group_size)
        return sum(count * n * (n + 1) // 2 for count, n in ((1, first), (whole, group_size), (1, rest)))

    return first_shifted_head * pairs(group_size) + (heads - first_shifted_head) * pairs(group_size // 2)


@register_flop_formula(torch.ops.longlora.s2attn_fwd)
def _forward(q: Any, k: Any, v: Any, group_size: int, first_shifted_head: int, *args: Any, **kwargs: Any) -> int:
    return 2 * 2 * _products(q, group_size, first_shifted_head)


@register_flop_formula(torch.ops.longlora.s2attn_bwd)
def _backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, group_size: int, first_shifted_head: int, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    return 5 * 2 * _products(q, group_size, first_shifted_head)


def _products(q: Any, group_size: int, first_shifted_head: int) -> int:
    """Multiplications in one product of the score matrix and a matrix of `q`'s shape, documents left aside."""
    batch, tokens, heads, head_dim = q
    return batch * head_dim * attended_pairs(tokens, group_size, heads, first_shifted_head)
