"""S2-Attn on rows that several processes share, where each gets from its neighbours only what its own rows see."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longlora_ext._arguments import with_positive_scale
from longlora_ext._kernels import padded, with_head_dim
from longlora_ext.parallel._call import prepare
from longlora_ext.parallel._exchange import Exchange
from longlora_ext.parallel._layout import Layout
from longlora_ext.parallel._sinks import Sinks

__all__ = ["HaloAttention", "halo_s2attn"]


@torch.compiler.disable
def halo_s2attn(
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
    """`longlora_ext.s2attn` on sequences that the processes of a group share: rank r holds the r-th part of each.

    A row sees its group, at most `group_size` rows back. So a rank gets only the keys and values that its rows lack,
    from the ranks before it, while it computes the heads that lack none; their gradients go back the same way and are
    added up in fp32. Any number of heads will do. It is collective, forward and backward: all ranks call it in the same
    order. With `group_size >= N` and no shifted head it is dense attention, for which a rank gets all keys before its
    own; `ulysses_s2attn` is better at that.

    Args:
        q: [B, L, H, D], this rank's rows, L on every rank. What a kernel of this package takes (`why_unsupported`):
            D of at most 256; bfloat16 or float16, on a CPU float32 or float64 as well.
        k: [B, L, Hkv, D], like `q`; Hkv divides H.
        v: Like `k`, but its heads may have another D, which is that of the result.
        group_size: G, tokens in a group, even.
        position_ids: int32 or int64 [B, L] or [1, L]: the place of each row in its document, which is counted from 0
            where it begins, on whichever rank that is. What ranks have to know of them costs a small all-gather each
            time that the tensor is another one or was written to, not in each layer that is given the same.
        group: The processes, in the order of the sequence; all by default.
        first_shifted_head: As for `s2attn`.
        window: As for `s2attn`. It limits what a rank lacks to `window - 1` rows.
        sink: As for `s2attn`. A rank gets the first row of a document that began before its rows.
        scale: As for `s2attn`.
        deterministic: As for `s2attn`.

    Returns:
        [B, L, H, D], contiguous, dtype of `q` (of autocast, under that).

    Raises:
        ValueError: On all ranks, before any work, if an argument of one does not fit, or no kernel takes it, or ranks
            differ in what must be the same, or their rows do not follow each other. After a first call with the same
            positions, a mistake of one rank is an error there, for which the others wait until they give up.
        RuntimeError: A rank has died, or did not come before the group's timeout; with gloo it says which.
    """
    arguments = (q, k, v, group_size, position_ids, group, first_shifted_head, window, sink, scale)
    call = prepare("halo_s2attn", *arguments, by_kernels=True)
    q, k, v = with_head_dim(padded(call.tensors[0].shape[3]), *call.tensors)
    batch, length, heads, _ = q.shape
    layout = Layout(
        ranks=len(call.positions),
        length=length,
        positions=tuple(each * (batch // len(each)) for each in call.positions),
        heads=heads,
        kv_heads=k.shape[2],
        group_size=group_size,
        first_shifted_head=call.first_shifted_head,
        window=window,
        sink=sink,
    )
    q, scale = with_positive_scale(q, call.scale)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    places = position_ids.expand(batch, -1)
    exchange = Exchange(layout, dist.get_rank(call.group), call.group)
    out = HaloAttention.apply(q, k, v, places, exchange, scale, deterministic)
    return out if out.shape[3] == call.head_dim else out[..., : call.head_dim].contiguous()


class HaloAttention(torch.autograd.Function):
    """Attention of each part of the heads, with the halo before its keys."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, places: Tensor, exchange: Exchange, scale: float, deterministic: bool
    ) -> Tensor:
        layout, rank = exchange.layout, exchange.rank
        ctx.exchange, ctx.scale, ctx.deterministic = exchange, scale, deterministic
        parts = layout.parts(rank)
        pending = exchange.send(k, v)
        results: list[Any] = [None] * len(parts)
        received: list[tuple[Tensor, Tensor]] | None = None
        for number in sorted(range(len(parts)), key=lambda number: parts[number].halo):
            part, halo = parts[number], None
            if part.halo:
                received = exchange.receive(pending, q.shape[-1]) if received is None else received
                halo = received[_halos_before(parts, number)]
            windows = _windows(k, v, part, halo)
            results[number] = torch.ops.longlora.s2attn_fwd(
                q[:, :, part.heads], *windows, *_pattern(ctx, places, part), window=layout.window
            )
        received = exchange.receive(pending, q.shape[-1]) if received is None else received
        out = torch.cat([out for out, _ in results], dim=2) if len(parts) > 1 else results[0][0]
        lse = torch.cat([lse for _, lse in results], dim=1) if len(parts) > 1 else results[0][1]
        halos = sum(part.halo > 0 for part in parts)
        ctx.sinks = Sinks(layout, rank, places, received[halos:], scale) if layout.sink else None
        if ctx.sinks:
            out, lse = ctx.sinks.add(out, lse, q, k, v)
        ctx.save_for_backward(q, k, v, out, lse, places, *(x for block in received[:halos] for x in block))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, places, *flat = ctx.saved_tensors
        halos = list(zip(flat[::2], flat[1::2], strict=True))
        exchange: Exchange = ctx.exchange
        parts = exchange.layout.parts(exchange.rank)
        found: list[Any] = [None] * len(parts)

        def attend(number: int) -> None:
            part = parts[number]
            windows = _windows(k, v, part, halos[_halos_before(parts, number)] if part.halo else None)
            rows = (x[:, :, part.heads] for x in (dout, q))
            found[number] = torch.ops.longlora.s2attn_bwd(
                *rows,
                *windows,
                out[:, :, part.heads],
                lse[:, part.heads],
                *_pattern(ctx, places, part),
                None,
                window=exchange.layout.window,
            )

        lacking = [number for number, part in enumerate(parts) if part.halo]
        for number in lacking:
            attend(number)
        of_sinks = ctx.sinks.backward(dout, out, lse, q, k, v) if ctx.sinks else None
        back = [tuple(grad[:, : parts[number].halo] for grad in found[number][1:]) for number in lacking]
        back += of_sinks.received if of_sinks else []
        pending = exchange.send_back(back, k)  # and what lacks nothing is computed while it travels
        for number in range(len(parts)):
            if number not in lacking:
                attend(number)

        dq = torch.cat([grads[0] for grads in found], dim=2) if len(parts) > 1 else found[0][0]
        dk, dv = (
            torch.cat([grads[i][:, part.halo :] for grads, part in zip(found, parts, strict=True)], dim=2)
            for i in (1, 2)
        )
        first = exchange.first_given
        if of_sinks:
            dq += of_sinks.dq
            first = min(first, of_sinks.first)
        if first < k.shape[1]:  # rows that others saw as well
            sums = [grad[:, first:].to(lse.dtype) for grad in (dk, dv)]
            exchange.add(pending, sums[0], sums[1], first)
            if of_sinks:
                of_sinks.add(sums[0], sums[1], first)
            for grad, total in zip((dk, dv), sums, strict=True):
                grad[:, first:] = total
        elif pending:
            pending.wait()
        return dq, dk, dv, None, None, None, None


def _windows(k: Tensor, v: Tensor, part: Any, halo: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The keys and values that the queries of a part see."""
    own = k[:, :, part.kv_heads], v[:, :, part.kv_heads]
    return own if halo is None else (torch.cat([halo[0], own[0]], 1), torch.cat([halo[1], own[1]], 1))


def _halos_before(parts: list[Any], number: int) -> int:
    return sum(part.halo > 0 for part in parts[:number])


def _pattern(ctx: Any, places: Tensor, part: Any) -> tuple[Any, ...]:
    """The op's arguments behind the keys: its documents count in rows of them, and may begin before."""
    rows = torch.arange(part.halo, part.halo + places.shape[1], device=places.device)
    doc_start = (rows - places).to(torch.int32)
    return ctx.exchange.layout.group_size, part.first_shifted_head, doc_start, ctx.scale, ctx.deterministic
