"""What groups alone do not say: documents, a window, queries that are the last of the keys.

It is computed in tiles of rows, each with the keys that its rows may see and a mask of these. The backward makes the
masks again, so that memory grows with the length alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longlora_ext._arguments import Arguments
from longlora_ext._strided._calls import halves, sdpa
from longlora_ext._strided._views import Join, Take

#: Entries of a tile's mask; of its scores, where they are formed.
MASK_ENTRIES, SCORES = 2**22, 2**24
FEWEST_ROWS, MOST_ROWS = 16, 1024

ALL = slice(None)


class _Tile(NamedTuple):
    """Rows of one call, as tokens among the keys, and the keys that they may see."""

    begin: int
    end: int
    first_key: int
    shifted: bool
    start: Tensor | int  # where their documents begin, [B, rows]

    def first_keys(self, pattern: Arguments, device: torch.device) -> tuple[Tensor, Tensor]:
        """[B or 1, rows]: of each row the token that it is, and the first key of its group and window."""
        row = torch.arange(self.begin, self.end, device=device)[None]
        return row, _first_key(row, self.start, pattern, self.shifted)


def _first_key(row: Any, start: Any, pattern: Arguments, shifted: bool) -> Any:
    """`first_key` of csrc/groups.h, of numbers or of tensors."""
    half = pattern.group_size // 2 if shifted else 0
    largest = torch.maximum if isinstance(row, Tensor) else max
    zero = row * 0
    first = start + largest((row - start + half) // pattern.group_size * pattern.group_size - half, zero)
    if pattern.window is not None:
        first = largest(first, row - pattern.window + 1)
    return largest(first, zero)


def by_tiles(q: Tensor, k: Tensor, v: Tensor, pattern: Arguments, forms_scores: bool) -> tuple[Tensor, Tensor | None]:
    """The output, and the log-sum-exp [B, H, N] where scores are formed."""
    batch, seqlen, heads, _ = q.shape
    keys = k.shape[1]
    reach = min(pattern.group_size, keys, keys if pattern.window is None else pattern.window)
    entries = SCORES // max(1, batch * k.shape[2]) if forms_scores else MASK_ENTRIES // max(1, batch)
    rows = max(FEWEST_ROWS, min(MOST_ROWS, max(reach, 128), entries // reach))
    doc_start = None if pattern.doc_start is None else pattern.doc_start.long()
    exact = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(exact), v.to(exact)  # so that gradients are summed
    sinks = _first_tokens(k, v, doc_start) if pattern.sink else []

    places, outs, lses = [], [], []
    for q_heads, kv_heads, shifted in halves(heads, k.shape[2], pattern.first_shifted_head, gqa=False):
        for i in range(0, seqlen, rows):
            tokens = slice(i, min(i + rows, seqlen))
            begin, end = (x + keys - seqlen for x in (tokens.start, tokens.stop))
            if doc_start is None:  # of later rows it is no earlier one
                tile = _Tile(begin, end, _first_key(begin, 0, pattern, shifted), shifted, 0)
            else:
                tile = _Tile(begin, end, max(0, begin - reach + 1), shifted, doc_start[:, tokens])
            places.append((ALL, tokens, q_heads))
            seen = (ALL, slice(tile.first_key, end), kv_heads)
            of_sinks = (ALL, ALL if doc_start is None else tokens, kv_heads)
            q_, q = Take.apply(q, places[-1])
            k_, k = Take.apply(k, seen)
            v_, v = Take.apply(v, seen)
            taken = [Take.apply(x, of_sinks) for x in sinks]
            sinks = [rest for _, rest in taken]
            attend = partial(_attend, tile, pattern, forms_scores)
            inputs = (q_, k_, v_, *(first for first, _ in taken))
            out, lse = checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False)
            outs.append(out)
            lses.append(lse)
    out = Join.apply(q.shape, places, *outs)
    if not forms_scores:
        return out, None
    return out, Join.apply(q.shape[:3], places, *lses).transpose(1, 2)


def _first_tokens(k: Tensor, v: Tensor, doc_start: Tensor | None) -> list[Tensor]:
    """The sink's key and value: of each row's document, or one for all."""
    if doc_start is None:
        return [k[:, :1], v[:, :1]]
    batch = torch.arange(len(k), device=k.device)[:, None]
    return [x[batch, doc_start.clamp(min=0)] for x in (k, v)]


def _attend(
    tile: _Tile, pattern: Arguments, forms_scores: bool, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Of one tile the output [B, rows, H, D], and [B, rows, H] where scores are formed; as many heads in k as in q."""
    row, first = tile.first_keys(pattern, q.device)
    key = torch.arange(tile.first_key, tile.end, device=q.device)
    seen = (key >= first[..., None]) & (key <= row[..., None])
    if sinks:
        lacks = (first > tile.start) & (torch.as_tensor(tile.start, device=q.device) >= 0)
        lacks = torch.diag_embed(lacks) if isinstance(tile.start, Tensor) else lacks[..., None]
        seen = torch.cat([lacks, seen], dim=-1)
        k, v = (torch.cat([sink, x], dim=1) for sink, x in zip(sinks, (k, v), strict=True))
    if not forms_scores:
        k, v = k.to(q.dtype), v.to(q.dtype)
        return sdpa(q, k, v, pattern.scale, attn_mask=seen[:, None]), None
    q_, k_, v_ = (x.to(k.dtype).transpose(1, 2) for x in (q, k, v))
    scores = (pattern.scale * q_ @ k_.transpose(-1, -2)).masked_fill(~seen[:, None], float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse[..., None]).exp() @ v_).transpose(1, 2).to(q.dtype), lse.transpose(1, 2)
