"""S2-Attn by torch's own attention, for devices, dtypes and head dims that have no kernel of ours.

The groups of an unshifted head are a view of q, k and v, [B * N / G, G, ...]; those of a shifted one are its first half
group, the whole groups behind it and the rest. Each is a causal call of `scaled_dot_product_attention`: no roll, no
copy, no mask. With the sink, its key goes in front of each group's, and a row in front of its rows.

What groups alone do not say (documents, a window, queries that are the last of the keys) is computed in tiles of rows,
each with the keys that its rows may see and a mask of these. The backward makes the masks again, so that memory grows
with the length alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longlora_ext._arguments import Arguments

__all__ = ["strided"]

#: Entries of a tile's mask; of its scores, where they are formed.
MASK_ENTRIES, SCORES = 2**22, 2**24
FEWEST_ROWS, MOST_ROWS = 16, 1024

ALL = slice(None)


def strided(
    q: Tensor, k: Tensor, v: Tensor, pattern: Arguments, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """S2-Attn with `torch.nn.functional.scaled_dot_product_attention`, on any device.

    Args:
        q: [B, N, H, D] of any floating dtype and any D.
        k: [B, Nk, Hkv, D], Nk >= N and Hkv divides H. The queries are the last of the keys' tokens.
        v: Like `k`.
        pattern: What a row sees, as in `longlora_ext.s2attn`.
        with_lse: The log-sum-exp of each row's scores is wanted, too.

    Returns:
        [B, N, H, D] contiguous, and the log-sum-exp [B, H, N] or `None`. Both can be differentiated.
    """
    plain = pattern.doc_start is None and pattern.window is None and q.shape[1] == k.shape[1]
    if plain and not with_lse and is_fused(q):
        return _by_groups(q, k, v, pattern), None
    return _by_tiles(q, k, v, pattern, with_lse)


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


class _Cut(torch.autograd.Function):
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


class _Take(torch.autograd.Function):
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


class _Join(torch.autograd.Function):
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


def _halves(heads: int, kv_heads: int, first_shifted_head: int, gqa: bool) -> Iterator[tuple[slice, slice, bool]]:
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


def _by_groups(q: Tensor, k: Tensor, v: Tensor, pattern: Arguments) -> Tensor:
    batch, seqlen, heads, _ = q.shape
    size = min(pattern.group_size, 2 * seqlen)
    foldable = all(x.stride(0) == seqlen * x.stride(1) for x in (q, k, v))
    calls, places, kv_places = [], [], []
    for q_heads, kv_heads, shifted in _halves(heads, k.shape[2], pattern.first_shifted_head, takes_gqa(q)):
        # Where nothing goes in front of later groups, the first is one of them.
        first = size // 2 if shifted else size if pattern.sink or size >= seqlen else 0
        for groups in _groups(batch, seqlen, size, first, foldable):
            if groups.size:
                calls.append(groups)
                places.append((groups.rows, groups.tokens, q_heads))
                kv_places.append((groups.rows, groups.tokens, kv_heads))
    sinks = [(rows, slice(0, 1), kv_heads) for rows, _, kv_heads in kv_places] if pattern.sink else []
    qs = _Cut.apply(q, places)
    ks, vs = (_Cut.apply(x, kv_places + sinks) for x in (k, v))
    parts = []
    for i, groups in enumerate(calls):
        q_, k_, v_ = (groups.fold(x[i]) for x in (qs, ks, vs))
        in_front = pattern.sink and groups.begin > 0
        if in_front:
            firsts = [qs[i][:, :1], *(x[len(calls) + i] for x in (ks, vs))]
            firsts = [first.repeat_interleave(groups.number, dim=0) for first in firsts]
            q_, k_, v_ = (torch.cat([first, x], dim=1) for first, x in zip(firsts, (q_, k_, v_), strict=True))
        out = _sdpa(q_, k_, v_, pattern.scale, is_causal=True)
        parts.append(groups.unfold(out[:, 1:] if in_front else out))
    return _Join.apply(q.shape, places, *parts)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: Any) -> Tensor:
    options["enable_gqa"] = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, **options).transpose(1, 2)


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


def _by_tiles(q: Tensor, k: Tensor, v: Tensor, pattern: Arguments, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    batch, seqlen, heads, _ = q.shape
    keys = k.shape[1]
    forms_scores = with_lse or not is_fused(q)
    reach = min(pattern.group_size, keys, keys if pattern.window is None else pattern.window)
    entries = SCORES // (batch * k.shape[2]) if forms_scores else MASK_ENTRIES // batch
    rows = max(FEWEST_ROWS, min(MOST_ROWS, max(reach, 128), entries // reach))
    doc_start = None if pattern.doc_start is None else pattern.doc_start.long()
    exact = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(exact), v.to(exact)  # so that gradients are summed
    sinks = _first_tokens(k, v, doc_start) if pattern.sink else []

    places, outs, lses = [], [], []
    for q_heads, kv_heads, shifted in _halves(heads, k.shape[2], pattern.first_shifted_head, gqa=False):
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
            q_, q = _Take.apply(q, places[-1])
            k_, k = _Take.apply(k, seen)
            v_, v = _Take.apply(v, seen)
            taken = [_Take.apply(x, of_sinks) for x in sinks]
            sinks = [rest for _, rest in taken]
            attend = partial(_attend, tile, pattern, forms_scores)
            inputs = (q_, k_, v_, *(first for first, _ in taken))
            out, lse = checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False)
            outs.append(out)
            lses.append(lse)
    out = _Join.apply(q.shape, places, *outs)
    if not with_lse:
        return out, None
    return out, _Join.apply(q.shape[:3], places, *lses).transpose(1, 2)


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
        return _sdpa(q, k, v, pattern.scale, attn_mask=seen[:, None]), None
    q_, k_, v_ = (x.to(k.dtype).transpose(1, 2) for x in (q, k, v))
    scores = (pattern.scale * q_ @ k_.transpose(-1, -2)).masked_fill(~seen[:, None], float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse[..., None]).exp() @ v_).transpose(1, 2).to(q.dtype), lse.transpose(1, 2)
