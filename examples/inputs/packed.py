"""Training sequences of one length from tokenised documents, which are kept apart in them.

The documents are laid end to end, and the result is cut every `context_length` tokens. What the cut makes of a
document is called a piece here.

- A document that does not fit is continued in the next sequence as a piece of its own, not dropped.
- Position ids restart at every piece, which is how the attention knows the pieces apart.
- The first token of a piece has the label -100: nothing of its own document stands before it to predict it
  from.
- The last sequence is filled up with padding, itself one piece with no labels, so that no token is lost. Only if it
  would hold a single token it is left out: there is nothing to learn in it, and it would cost a step all the same.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from inputs.tokens import Tokenised
from longlora_ext.loss import IGNORED_LABEL


class PackedSequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Tokenised documents, laid end to end and cut into sequences of one length.

    Nothing is copied up front: a sequence is put together when it is asked for.

    Args:
        documents: The tokenised documents.
        context_length: Tokens of a sequence.
        pad_token_id: What fills the last sequence up.

    Item `i` holds `input_ids`, `position_ids` and `labels`, int64 [context_length] each. `tokens` are in the sequences:
    all, or all but the last, if that would be alone in a sequence and is not the only one.
    """

    def __init__(self, documents: Tokenised, context_length: int, pad_token_id: int) -> None:
        if context_length < 2:
            raise ValueError(f"context_length must be 2 or more, got {context_length}")
        self.context_length = context_length
        self.pad_token_id = pad_token_id
        self.chunks = [chunk.flatten().to_numpy() for chunk in documents.arrow_ids.chunks]
        self.chunk_starts = np.cumsum([0, *map(len, self.chunks)])
        self.document_starts = np.cumsum([0, *documents.lengths])
        total = int(self.document_starts[-1])
        self.tokens = total - 1 if total > context_length and total % context_length == 1 else total

    def __len__(self) -> int:
        return -(-self.tokens // self.context_length)

    @property
    def padding(self) -> int:
        """Padding tokens at the end of the last sequence."""
        return len(self) * self.context_length - self.tokens

    @property
    def targets(self) -> int:
        """Tokens that are learned from: all but the first of each piece."""
        cuts = np.arange(0, self.tokens, self.context_length)
        starts = self.document_starts[self.document_starts < self.tokens]
        return self.tokens - len(np.union1d(cuts, starts))

    def fingerprint(self) -> dict[str, Any]:
        """What tells the text from any other text, as JSON."""
        digest = hashlib.sha256(self.document_starts.astype("<i8").tobytes())
        for chunk in self.chunks:
            digest.update(chunk.astype("<i4").tobytes())
        return {
            "train_documents": len(self.document_starts) - 1,
            "train_tokens": int(self.document_starts[-1]),
            "train_sha256": digest.hexdigest(),
        }

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        begin = index * self.context_length
        end = min(begin + self.context_length, self.tokens)

        input_ids = np.full(self.context_length, self.pad_token_id, dtype=np.int64)
        input_ids[: end - begin] = self._read(begin, end)

        first, last = np.searchsorted(self.document_starts, (begin, end))
        inner_starts = self.document_starts[first:last] - begin
        if end - begin < self.context_length:
            inner_starts = np.append(inner_starts, end - begin)  # the padding is a piece too
        place = np.arange(self.context_length)
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
