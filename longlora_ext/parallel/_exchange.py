"""Rows of keys and values on their way to the ranks that lack them, and their gradients on the way back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longlora_ext.parallel._layout import Block, Layout

__all__ = ["Exchange", "Pending", "told"]

#: Seconds that ranks have to answer once something has failed.
ROLL_CALL = 5.0


@contextmanager
def told(group: dist.ProcessGroup) -> Iterator[None]:
    """Say for whom a failed collective has waited.

    Raises:
        RuntimeError: It failed: which ranks are not there any more, and what the backend says.
    """
    try:
        yield
    except RuntimeError as error:
        rank, ranks, absent = dist.get_rank(group), dist.get_world_size(group), _absent(group)
        who = f"rank {absent[0]}" if len(absent) == 1 else "another one"
        if len(absent) > 1:  # a rank that waits for the one that failed cannot answer
            who = f"one of ranks {', '.join(map(str, absent))} (others of these may wait for it too)"
        raise RuntimeError(
            f"rank {rank} of the {ranks} that share a sequence waited in vain for {who}, which failed, or took longer "
            f"than the process group's timeout. The backend says: {error}"
        ) from error


def _absent(group: dist.ProcessGroup) -> list[int]:
    """Ranks that do not come to a roll call. The group itself is of no use after a failure; its store is."""
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank()
    keys = {rank: f"longlora_ext/present/{'-'.join(map(str, ranks))}/{rank}" for rank in ranks}
    missing = [rank for rank in ranks if rank != me]
    end = time.monotonic() + ROLL_CALL
    try:
        store = group.get_group_store()
        store.set(keys[me], "")
        while missing and time.monotonic() < end:
            missing = [rank for rank in missing if not store.check([keys[rank]])]
            time.sleep(0.05)
    except Exception:  # whoever holds the store is gone, mostly the first process
        missing = [rank for rank in missing if rank == 0]
    return [dist.get_group_rank(group, rank) for rank in missing]


class Pending:
    """Numbers on their way between all ranks of a group.

    Args:
        sent: What each rank is sent, one after the other; empty lists are allowed.
        counts: How many numbers each rank sends to this one.
        like: A tensor of their dtype and device.
        group: The ranks.
    """

    def __init__(
        self, sent: Sequence[Sequence[Tensor]], counts: Sequence[int], like: Tensor, group: dist.ProcessGroup
    ) -> None:
        self.counts, self.dtype, self.group = list(counts), like.dtype, group
        size = like.element_size()
        flat = [tensor.reshape(-1) for tensors in sent for tensor in tensors]
        # As bytes: backends differ in the dtypes that they know. Kept until the work is done.
        self.sent = (torch.cat(flat) if flat else like.new_empty(0)).view(torch.uint8)
        self.received = torch.empty(size * sum(counts), dtype=torch.uint8, device=like.device)
        sizes = [size * sum(tensor.numel() for tensor in tensors) for tensors in sent]
        with told(group):
            self.work = dist.all_to_all_single(
                self.received, self.sent, [size * count for count in counts], sizes, group=group, async_op=True
            )

    def wait(self) -> list[Tensor]:
        """What each rank sent, flat."""
        with told(self.group):
            self.work.wait()
        return list(self.received.view(self.dtype).split(self.counts))


class Exchange:
    """What one rank of a layout sends and receives.

    Args:
        layout: What each lacks.
        rank: This one.
        group: The ranks.

    Attributes:
        pending: What makes numbers travel.
    """

    pending: Callable[..., Any] = Pending

    def __init__(self, layout: Layout, rank: int, group: Any) -> None:
        self.layout, self.rank, self.group = layout, rank, group
        ranks = range(layout.ranks)
        self.lacking = layout.lacking(self.rank)
        self._gives = [list(layout.messages(self.rank, rank)) for rank in ranks]
        self._gets = [list(layout.messages(rank, self.rank)) for rank in ranks]

    @property
    def first_given(self) -> int:
        """The first of this rank's rows that another one lacks; as many as there are if none is lacking."""
        first = [block.first for blocks in self._gives for _, block in blocks]
        return min(first, default=(self.rank + 1) * self.layout.length) - self.rank * self.layout.length

    def send(self, k: Tensor, v: Tensor) -> Pending | None:
        """Begin to send rows to those who lack them; `None` if nobody does."""
        if self.layout.is_silent:
            return None
        sent = [[x[self._place(block)] for _, block in blocks for x in (k, v)] for blocks in self._gives]
        return self.pending(sent, self._counts(self._gets, k.shape[-1]), k, self.group)

    def receive(self, pending: Pending | None, head_dim: int) -> list[tuple[Tensor, Tensor]]:
        """The keys and values [batch, rows, kv_heads, head_dim] of all blocks that this rank lacks."""
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.lacking]
        for numbers, blocks in zip(pending.wait() if pending else (), self._gets, strict=False):
            pieces = iter(numbers.split(self._splits(blocks, head_dim)))
            for number, block in blocks:
                k, v = (next(pieces).view(self._shape(block, head_dim)) for _ in "kv")
                found[number].append((k, v))
        return [(torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)) for parts in found]

    def send_back(self, grads: list[tuple[Tensor, Tensor]], like: Tensor) -> Pending | None:
        """Begin to send the gradients of what was received to the owners of the rows."""
        if self.layout.is_silent:
            return None
        sent: list[list[Tensor]] = [[] for _ in self._gets]
        for rank, blocks in enumerate(self._gets):
            for number, block in blocks:
                first = block.first - self.lacking[number].first
                sent[rank] += [x[:, first : first + block.end - block.first] for x in grads[number]]
        return self.pending(sent, self._counts(self._gives, like.shape[-1]), like, self.group)

    def add(self, pending: Pending | None, dk: Tensor, dv: Tensor, first: int) -> None:
        """Add the gradients that came back to fp32 sums of this rank's rows from `first` on."""
        for numbers, blocks in zip(pending.wait() if pending else (), self._gives, strict=False):
            pieces = iter(numbers.split(self._splits(blocks, dk.shape[-1])))
            for _, block in blocks:
                batch, rows, heads = self._place(block)
                for grad in (dk, dv):
                    place = grad[batch, rows.start - first : rows.stop - first, heads]
                    place += next(pieces).view(place.shape)

    def _place(self, block: Block) -> tuple[slice, slice, slice]:
        begin = self.rank * self.layout.length
        return block.batch, slice(block.first - begin, block.end - begin), block.kv_heads

    @staticmethod
    def _shape(block: Block, head_dim: int) -> tuple[int, int, int, int]:
        batch, heads = (part.stop - part.start for part in (block.batch, block.kv_heads))
        return batch, block.end - block.first, heads, head_dim

    @staticmethod
    def _splits(blocks: list[tuple[int, Block]], head_dim: int) -> list[int]:
        return [block.numbers * head_dim for _, block in blocks for _ in "kv"]

    def _counts(self, messages: list[list[tuple[int, Block]]], head_dim: int) -> list[int]:
        return [sum(self._splits(blocks, head_dim)) for blocks in messages]
