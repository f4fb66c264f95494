"""What the operator computes, for torch's own counter (`torch.utils.flop_counter.FlopCounterMode`)."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def attended_pairs(
    tokens: int, group_size: int, heads: int, first_shifted_head: int, window: int | None = None, sink: bool = False
) -> int:
    """(query, key) pairs of one sequence: each group of n tokens holds n (n + 1) / 2, a shifted head's first is half
    as long. With a window a token sees so many at most, with a sink one more unless it is among them."""
    limit = tokens if window is None else window

    def of_group(n: int) -> int:
        seen = min(n, limit)
        return seen * (seen + 1) // 2 + (n - seen) * limit

    def pairs(first: int) -> int:
        first = min(first, tokens)
        whole, rest = divmod(tokens - first, group_size)
        sinks = tokens - min(first, limit) if sink else 0
        return of_group(first) + whole * of_group(group_size) + of_group(rest) + sinks

    return first_shifted_head * pairs(group_size) + (heads - first_shifted_head) * pairs(group_size // 2)


@register_flop_formula(torch.ops.longlora.s2attn_fwd)
def _forward(q: Any, k: Any, v: Any, group_size: int, first_shifted_head: int, *args: Any, **kwargs: Any) -> int:
    return 2 * 2 * _products(q, k, group_size, first_shifted_head, **kwargs)


@register_flop_formula(torch.ops.longlora.s2attn_bwd)
def _backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, group_size: int, first_shifted_head: int, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    return 5 * 2 * _products(q, k, group_size, first_shifted_head, **kwargs)


def _products(
    q: Any, k: Any, group_size: int, first_shifted_head: int, sink: bool = False, window: int | None = None, **_: Any
) -> int:
    """Multiplications in one product of the score matrix and a matrix of `q`'s shape, documents left aside."""
    batch, tokens, heads, head_dim = q
    pattern = (group_size, heads, first_shifted_head, window, sink)
    last_rows = attended_pairs(k[1], *pattern) - attended_pairs(k[1] - tokens, *pattern)
    return batch * head_dim * last_rows
