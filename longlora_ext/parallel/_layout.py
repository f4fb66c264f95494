"""Which rows of keys and values a rank lacks, and who has them: arithmetic alone, the same on every rank.

`ranks` processes share a sequence: rank r holds rows [r * length, (r + 1) * length) of it. A row sees at most the group
it stands in, so that a rank lacks the rows from the start of its first row's group on: its halo. With a sink it lacks
the first row of that row's document besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Block", "Layout", "Part", "rows_before"]


def rows_before(position: int, group_size: int, shifted: bool, window: int | None) -> int:
    """How many rows before it a row sees, in an unshifted head or a shifted one.

    Args:
        position: Its place in its document.
        group_size: G, even.
        shifted: Whether the groups of the head are cut half a group later.
        window: The most rows that a row sees, itself among them; `None` is no limit.
    """
    in_group = min(position, (position + (group_size // 2 if shifted else 0)) % group_size)
    return in_group if window is None else min(in_group, window - 1)


class Part(NamedTuple):
    """KV heads whose queries lack equally many rows, and the first of their query heads that is shifted."""

    kv_heads: slice
    heads: slice
    first_shifted_head: int
    halo: int


class Block(NamedTuple):
    """Rows of keys and values, counted from the start of the shared sequence."""

    batch: slice
    first: int
    end: int
    kv_heads: slice

    @property
    def numbers(self) -> int:
        """How many numbers a block of keys has for each dimension of a head."""
        size = (self.batch.stop - self.batch.start) * (self.kv_heads.stop - self.kv_heads.start)
        return size * (self.end - self.first)


@dataclass(frozen=True)
class Layout:
    """What all ranks know of a call.

    Attributes:
        ranks: P, how many processes share the sequences.
        length: L, rows of a sequence on each of them.
        positions: For each rank the place of its first row in its document, in each sequence of the batch.
        heads, kv_heads: Query heads, and those of keys and values.
        group_size, first_shifted_head, window, sink: As for `longlora_ext.s2attn`.
    """

    ranks: int
    length: int
    positions: tuple[tuple[int, ...], ...]
    heads: int
    kv_heads: int
    group_size: int
    first_shifted_head: int
    window: int | None = None
    sink: bool = False

    def parts(self, rank: int) -> list[Part]:
        """The heads of a rank: those of unshifted queries, and those of shifted ones.

        A KV head of both is with those who lack more rows.
        """
        unshifted, shifted = (
            max(rows_before(position, self.group_size, half, self.window) for position in self.positions[rank])
            for half in (False, True)
        )
        each = self.heads // self.kv_heads
        if self.first_shifted_head in (0, self.heads) or unshifted == shifted:
            cut = 0 if self.first_shifted_head < self.heads else self.kv_heads
        else:
            cut = -(-self.first_shifted_head // each) if unshifted > shifted else self.first_shifted_head // each
        parts = []
        for first, end, halo in ((0, cut, unshifted), (cut, self.kv_heads, shifted)):
            if first < end:
                heads = slice(first * each, end * each)
                first_shifted = min(max(self.first_shifted_head - heads.start, 0), heads.stop - heads.start)
                parts.append(Part(slice(first, end), heads, first_shifted, halo))
        return parts

    def lacking(self, rank: int) -> list[Block]:
        """What a rank lacks: the halo of each part that has one, then the sink of each document that goes on here."""
        begin, batch = rank * self.length, len(self.positions[rank])
        blocks = [
            Block(slice(0, batch), begin - part.halo, begin, part.kv_heads) for part in self.parts(rank) if part.halo
        ]
        if self.sink:
            for row, position in enumerate(self.positions[rank]):
                if position:
                    document = begin - position
                    blocks.append(Block(slice(row, row + 1), document, document + 1, slice(0, self.kv_heads)))
        return blocks

    def messages(self, source: int, target: int) -> Iterator[tuple[int, Block]]:
        """What one rank sends to another: parts of what that one lacks, and which of its blocks each is part of."""
        if source >= target:
            return
        begin, end = source * self.length, (source + 1) * self.length
        for number, block in enumerate(self.lacking(target)):
            first, last = max(block.first, begin), min(block.end, end)
            if first < last:
                yield number, block._replace(first=first, end=last)

    def numbers_sent(self, source: int, target: int) -> int:
        """How many numbers that is for each dimension of a head, keys and values together."""
        return 2 * sum(block.numbers for _, block in self.messages(source, target))

    @property
    def is_silent(self) -> bool:
        """Whether nobody lacks anything."""
        return not any(self.lacking(rank) for rank in range(self.ranks))
