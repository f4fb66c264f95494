"""Groups alone, as views of q, k and v, [B * N / G, G, ...].

Those of an unshifted head are the whole groups; those of a shifted one are its first half group, the whole groups after
it and the rest. Each is a causal call of `scaled_dot_product_attention`: no roll, no copy, no mask. With the sink, its
key goes in front of each group's, and a row in front of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longlora_ext._arguments import Arguments
from longlora_ext._strided._calls import halves, sdpa, takes_gqa
from longlora_ext._strided._views import Cut, Join

ALL = slice(None)


class _Groups(NamedTuple):
    """Groups of one call."""

    rows: slice  # of the batch
    begin: int  # their first token
    number: int
    size: int

    @property
    def tokens(self) -> slice:
        return slice(self.begin, self.begin + self.number * self.size)

    def fold(self, x: Tensor) -> Tensor:
        """[B * number, size, H, D] of [B, number * size, H, D], a view."""
        return x if self.number == 1 else x.unflatten(1, (self.number, self.size)).flatten(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        return x if self.number == 1 else x.unflatten(0, (-1, self.number)).flatten(1, 2)


def _groups(batch: int, seqlen: int, size: int, first: int, foldable: bool) -> Iterator[_Groups]:
    """All groups of a sequence, the first of which has `first` tokens, in few calls."""
    first = min(first, seqlen)
    yield _Groups(ALL, 0, 1, first)
    count, rest = divmod(seqlen - first, size)
    if count == 1 or (count and batch == 1) or (foldable and count * size == seqlen):
        yield _Groups(ALL, first, count, size)
    elif batch <= count:
        yield from (_Groups(slice(b, b + 1), first, count, size) for b in range(batch if count else 0))
    else:
        yield from (_Groups(ALL, first + i * size, 1, size) for i in range(count))
    if rest:
        yield _Groups(ALL, seqlen - rest, 1, rest)


def by_groups(q: Tensor, k: Tensor, v: Tensor, pattern: Arguments) -> Tensor:
    batch, seqlen, heads, _ = q.shape
    size = min(pattern.group_size, 2 * seqlen)
    foldable = all(x.stride(0) == seqlen * x.stride(1) for x in (q, k, v))
    calls, places, kv_places = [], [], []
    for q_heads, kv_heads, shifted in halves(heads, k.shape[2], pattern.first_shifted_head, takes_gqa(q)):
        # Where nothing goes in front of later groups, the first is one of them.
        first = size // 2 if shifted else size if pattern.sink or size >= seqlen else 0
        for groups in _groups(batch, seqlen, size, first, foldable):
            if groups.size:
                calls.append(groups)
                places.append((groups.rows, groups.tokens, q_heads))
                kv_places.append((groups.rows, groups.tokens, kv_heads))
    sinks = [(rows, slice(0, 1), kv_heads) for rows, _, kv_heads in kv_places] if pattern.sink else []
    qs = Cut.apply(q, places)
    ks, vs = (Cut.apply(x, kv_places + sinks) for x in (k, v))
    parts = []
    for i, groups in enumerate(calls):
        q_, k_, v_ = (groups.fold(x[i]) for x in (qs, ks, vs))
        in_front = pattern.sink and groups.begin > 0
        if in_front:
            firsts = [qs[i][:, :1], *(x[len(calls) + i] for x in (ks, vs))]
            firsts = [first.repeat_interleave(groups.number, dim=0) for first in firsts]
            q_, k_, v_ = (torch.cat([first, x], dim=1) for first, x in zip(firsts, (q_, k_, v_), strict=True))
        out = sdpa(q_, k_, v_, pattern.scale, is_causal=True)
        parts.append(groups.unfold(out[:, 1:] if in_front else out))
    return Join.apply(q.shape, places, *parts)
