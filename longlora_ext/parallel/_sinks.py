"""The first row of its document for rows that do not see it: merged into what they have seen, and back.

The op's own sink needs the first rows of all documents among the keys. Here a document may have begun on another rank.
Its first row is one key more, so that what is in `out` and `lse` suffices; and as the gradients of all other keys
follow from the merged `out` and `lse`, so do those of the sink. Rows are taken some at a time, as the work is in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longlora_ext.parallel._layout import Layout

__all__ = ["Sinks"]

#: Rows that are merged at a time.
ROWS = 1024


@dataclass
class SinkGradients:
    """The gradients that the sinks add: to q, to rows of other ranks, and to rows of this one."""

    dq: Tensor
    received: list[tuple[Tensor, Tensor]]
    first: int
    own: tuple[Tensor, Tensor, Tensor]

    def add(self, dk: Tensor, dv: Tensor, first: int) -> None:
        """Add those of this rank's rows to fp32 sums of its rows from `first` on."""
        begins, own_dk, own_dv = self.own
        batch, rows = begins.unbind(1)
        dk[batch, rows - first] += own_dk
        dv[batch, rows - first] += own_dv


class Sinks:
    """The sinks of one rank's rows.

    Args:
        layout: What all ranks know of the call.
        rank: This one.
        places: [B, L], the place of each row in its document.
        received: The first rows of documents that go on here, [1, 1, Hkv, D] each, of keys and of values.
        scale: Factor of the scores.
    """

    def __init__(
        self, layout: Layout, rank: int, places: Tensor, received: list[tuple[Tensor, Tensor]], scale: float
    ) -> None:
        self.layout, self.places, self.received, self.scale = layout, places, received, scale
        self.begins = (places == 0).nonzero()
        goes_on = torch.tensor([position > 0 for position in layout.positions[rank]], device=places.device)
        # Documents are numbered: those that go on from another rank, then those that begin here.
        before = torch.cumsum(goes_on, 0) - 1
        begun = torch.cumsum((places == 0).flatten(), 0).view_as(places)
        first_here = torch.cumsum((places == 0).sum(1), 0) - (places == 0).sum(1)  # documents of sequences before
        here = begun - first_here[:, None] > 0
        self.document = torch.where(here, len(received) + begun - 1, before[:, None].expand_as(places))

    def _keys(self, x: Tensor, of: int) -> Tensor:
        """The first row of each document, [documents, Hkv, D]."""
        batch, rows = self.begins.unbind(1)
        return torch.cat([*(block[of][0] for block in self.received), x[batch, rows]])

    def _tiles(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some rows at a time, [B, rows]: which, the numbers of their documents, and who sees the sink by it alone."""
        layout = self.layout
        shifted = torch.arange(layout.heads, device=self.places.device) >= layout.first_shifted_head
        for first in range(0, layout.length, ROWS):
            rows = slice(first, first + ROWS)
            place = self.places[:, rows, None]
            seen = torch.minimum(place, (place + shifted * (layout.group_size // 2)) % layout.group_size)
            if layout.window is not None:
                seen = seen.clamp(max=layout.window - 1)
            yield rows, self.document[:, rows], seen < place

    def _scores(self, q: Tensor, keys: Tensor, alone: Tensor) -> Tensor:
        """[B, rows, H], minus infinity for those who have seen the row already."""
        each = q.shape[2] // keys.shape[2]
        scores = self.scale * (q.unflatten(2, (-1, each)) * keys[:, :, :, None]).sum(-1).flatten(2)
        return scores.masked_fill(~alone, float("-inf"))

    def add(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`out` [B, L, H, D] and `lse` [B, H, L] with the sinks; both are written to."""
        keys, values = (self._keys(x, of).to(lse.dtype) for of, x in enumerate((k, v)))
        each = q.shape[2] // k.shape[2]
        for rows, document, alone in self._tiles():
            scores = self._scores(q[:, rows].to(lse.dtype), keys[document], alone)
            before = lse[:, :, rows].transpose(1, 2)
            merged = torch.logaddexp(before, scores)
            weight = (scores - merged).exp()[..., None]
            own = values[document].repeat_interleave(each, dim=2)
            out[:, rows] = ((before - merged).exp()[..., None] * out[:, rows] + weight * own).to(out.dtype)
            lse[:, :, rows] = merged.transpose(1, 2)
        return out, lse

    def backward(self, dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> SinkGradients:
        """The gradients through the sinks, from the final `out` and `lse`."""
        keys, values = (self._keys(x, of).to(lse.dtype) for of, x in enumerate((k, v)))
        dq, dkeys, dvalues = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        each = q.shape[2] // k.shape[2]
        for rows, document, alone in self._tiles():
            query, grad = q[:, rows].to(lse.dtype), dout[:, rows].to(lse.dtype)
            key, value = (x[document].repeat_interleave(each, dim=2) for x in (keys, values))
            weight = (self._scores(query, keys[document], alone) - lse[:, :, rows].transpose(1, 2)).exp()
            dscore = self.scale * weight * (grad * (value - out[:, rows])).sum(-1)
            dq[:, rows] = (dscore[..., None] * key).to(q.dtype)
            # By index_put_, which adds in the same order in every run.
            for total, part in ((dkeys, dscore[..., None] * query), (dvalues, weight[..., None] * grad)):
                part = part.unflatten(2, (-1, each)).sum(3)
                total.index_put_((document.flatten(),), part.flatten(0, 1), accumulate=True)
        count = len(self.received)
        received = [
            (dk[None, None].to(k.dtype), dv[None, None].to(v.dtype))
            for dk, dv in zip(dkeys[:count], dvalues[:count], strict=True)
        ]
        first = int(self.begins[:, 1].min()) if len(self.begins) else self.layout.length
        return SinkGradients(dq, received, first, (self.begins, dkeys[count:], dvalues[count:]))
