"""Sequences that processes share, for test_halo.py and the processes that it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HEAD_DIM = 8


@dataclass(frozen=True)
class Case:
    """`length` rows a rank; the documents' lengths, which the last one fills up to the sequence."""

    length: int
    group_size: int
    heads: int = 4
    kv_heads: int = 2
    batch: int = 1
    documents: tuple[int, ...] = ()
    first_shifted_head: int | None = None
    window: int | None = None
    sink: bool = False
    head_dim: int = HEAD_DIM
    value_dim: int | None = None  # where it is another
    each_row_its_own: bool = False  # another sequence of the batch is one document

    @property
    def pattern(self) -> dict[str, Any]:
        return {"first_shifted_head": self.first_shifted_head, "window": self.window, "sink": self.sink}

    def places(self, ranks: int) -> Tensor:
        """[B, N], the place of each row in its document."""
        seqlen, lengths, room = ranks * self.length, [], ranks * self.length
        for length in (*self.documents, seqlen):
            lengths.append(min(length, room))
            room -= lengths[-1]
        places = torch.cat([torch.arange(length) for length in lengths])[None].repeat(self.batch, 1)
        if self.each_row_its_own:
            places[-1] = torch.arange(seqlen)
        return places

    def tensors(self, ranks: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """q, k and v, the gradient of the result, and the places, of all ranks."""
        rows = self.batch, ranks * self.length

        def random(heads: int, head_dim: int = self.head_dim) -> Tensor:
            return torch.randn(*rows, heads, head_dim, dtype=torch.float64)

        of_values = self.value_dim or self.head_dim
        return (
            [random(self.heads), random(self.kv_heads), random(self.kv_heads, of_values)],
            random(self.heads, of_values),
            self.places(ranks),
        )


CASES = {
    "a multiple of the group": Case(16, 8),
    "the group": Case(16, 16),
    "half of the group": Case(16, 32),
    "a quarter of the group": Case(16, 64),
    "no multiple": Case(18, 10),
    "one group of all": Case(16, 256),
    "dense": Case(16, 256, first_shifted_head=4),
    "all shifted": Case(16, 12, first_shifted_head=0),
    "nine heads": Case(16, 12, heads=9, kv_heads=3),
    "nine heads, one of keys": Case(16, 32, heads=9, kv_heads=1),
    "one KV head": Case(16, 24, kv_heads=1),
    "as many KV heads": Case(16, 24, kv_heads=4),
    "a head dim that is padded": Case(16, 24, head_dim=HEAD_DIM - 3),  # what is sent is padded too
    "values of fewer dimensions": Case(16, 24, value_dim=HEAD_DIM - 3, documents=(5, 20)),
    "values of more dimensions": Case(16, 24, head_dim=HEAD_DIM - 3, value_dim=HEAD_DIM),
    "documents that end on borders": Case(16, 8, documents=(16, 16, 16)),
    "documents across borders": Case(16, 8, documents=(5, 20, 30)),
    "a document over three ranks": Case(8, 12, documents=(6, 12)),
    "a row of padding": Case(16, 8, documents=(19, 1, 1, 3)),
    "two sequences": Case(16, 12, batch=2, documents=(5, 20), each_row_its_own=True),
    "a window": Case(16, 64, window=7, documents=(5, 20)),
    "a window of one": Case(16, 64, window=1),
    "a sink": Case(16, 8, sink=True, documents=(5, 20, 30)),
    "a sink over all": Case(16, 12, sink=True, heads=6),
    "a sink and a window": Case(16, 256, sink=True, window=6, first_shifted_head=4),
    "a sink in two sequences": Case(16, 12, sink=True, batch=2, documents=(16, 20), each_row_its_own=True),
}
