"""Training sequences from tokenised documents, which are kept apart in them.

The documents are laid end to end, and the result is cut every `context_length` tokens; or each document is cut by
itself, and what comes of it has rows of its own. What the cut makes of a document is called a piece here.

- A document that does not fit is continued in the next sequence as a piece of its own, not dropped.
- Position ids restart at every piece, which is how the attention knows the pieces apart.
- The first token of a piece has the label -100: nothing of its own document stands before it to predict it
  from.
- The last sequence is filled up with padding, itself one piece with no labels, so that no token is lost. Only if it
  would hold a single token it is left out: there is nothing to learn in it, and it would cost a step all the same. So
  is a piece of a single token that would have a row of its own.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from inputs.tokens import Tokenised
from longlora_ext.loss import IGNORED_LABEL


class PackedSequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Tokenised documents, laid end to end and cut into sequences of one length, or in rows of their own.

    Nothing is copied up front: a sequence is put together when it is asked for.

    Args:
        documents: The tokenised documents.
        context_length: Tokens of a sequence.
        pad_token_id: What fills the last sequence up.
        own_rows: Each piece is a row, which ends where the piece does (`samples.pad_rows` makes those of a batch
            equally long), for models in which documents of one row see each other.

    Item `i` holds `input_ids`, `position_ids` and `labels`, int64 [context_length] each, or [length of the piece].
    `tokens` are in the sequences: all but those that would be alone in one and are not the only one.
    """

    def __init__(self, documents: Tokenised, context_length: int, pad_token_id: int, own_rows: bool = False) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must be 2 or more, got {context_length}")
        self.context_length = context_length
        self.pad_token_id = pad_token_id
        self.own_rows = own_rows
        self.chunks = [chunk.flatten().to_numpy() for chunk in documents.arrow_ids.chunks]
        self.chunk_starts = np.cumsum([0, *map(len, self.chunks)])
        self.document_starts = np.cumsum([0, *documents.lengths])
        # What is cut by itself: all documents together, or each.
        wholes = self.document_starts if own_rows else self.document_starts[[0, -1]]
        counts = -(-np.diff(wholes) // context_length)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self.begins = np.repeat(wholes[:-1], counts) + number * context_length
        self.ends = np.minimum(self.begins + context_length, np.repeat(wholes[1:], counts))
        if len(self.begins) > 1:
            worth = self.ends - self.begins > 1
            self.begins, self.ends = self.begins[worth], self.ends[worth]
        self.tokens = int((self.ends - self.begins).sum())

    def __len__(self) -> int:
        return len(self.begins)

    @property
    def padding(self) -> int:
        """Padding tokens at the end of the last sequence."""
        return 0 if self.own_rows else len(self) * self.context_length - self.tokens

    @property
    def targets(self) -> int:
        """Tokens that are learned from: all but the first of each piece."""
        starts = self.document_starts[self.document_starts < self.ends.max(initial=0)]
        return self.tokens - len(self.begins if self.own_rows else np.union1d(self.begins, starts))

    def fingerprint(self) -> dict[str, Any]:
        """What tells the text from any other text, as JSON."""
        digest = hashlib.sha256(self.document_starts.astype("<i8").tobytes())
        for chunk in self.chunks:
            digest.update(chunk.astype("<i4").tobytes())
        return {
            "train_documents": len(self.document_starts) - 1,
            "train_tokens": int(self.document_starts[-1]),
            "train_sha256": digest.hexdigest(),
            **({"rows": "padded"} if self.own_rows else {}),
        }

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        begin, end = int(self.begins[index]), int(self.ends[index])
        length = end - begin if self.own_rows else self.context_length

        input_ids = np.full(length, self.pad_token_id, dtype=np.int64)
        input_ids[: end - begin] = self._read(begin, end)

        first, last = np.searchsorted(self.document_starts, (begin, end))
        inner_starts = self.document_starts[first:last] - begin
        if end - begin < length:
            inner_starts = np.append(inner_starts, end - begin)  # the padding is a piece too
        place = np.arange(length)
        piece_start = np.zeros_like(place)
        piece_start[inner_starts] = inner_starts
        position_ids = place - np.maximum.accumulate(piece_start)

        labels = np.where(position_ids == 0, IGNORED_LABEL, input_ids)
        labels[end - begin :] = IGNORED_LABEL
        items = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in items.items()}

    def _read(self, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of all documents laid end to end."""
        first = int(np.searchsorted(self.chunk_starts, begin, side="right")) - 1
        parts = []
        while begin < end:
            offset = begin - self.chunk_starts[first]
            parts.append(self.chunks[first][offset : offset + end - begin])
            begin += len(parts[-1])
            first += 1
        return np.concatenate(parts)
