"""Training rows from documents or samples, with the documents of a row kept apart.

    rows = PackedSequences(documents, 32768, tokenizer.eos_token_id)         # text: lists of token ids
    rows = SampleRows(samples, 32768, tokenizer.eos_token_id, packed=True)   # answers: token ids and labels
    collate = partial(pad_rows, pad_token_id=tokenizer.eos_token_id)

    Trainer(model, args, train_dataset=rows, data_collator=collate)          # or
    DataLoader(rows, batch_size=2, collate_fn=collate)

Both are datasets of rows: dicts of `input_ids`, `position_ids` and `labels`, int64 `[tokens of the row]`. Position ids
restart at every document, sample and padding, which is how the attention keeps them apart; a first token has the label
-100, as nothing of its own document stands before it to predict it from. No attention mask is needed. Rows of one
length, which those of `PackedSequences` and of packed samples are, need no `pad_rows` either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from longlora_ext._rows import check_row, chunks_of, filled, pack, pad_rows, token_ids
from longlora_ext.loss import IGNORED_LABEL

__all__ = ["PackedSequences", "SampleRows", "pack", "pad_rows"]


class PackedSequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Documents laid end to end and cut into sequences of one length, or in rows of their own.

    What a cut makes of a document is called a piece here.

    - A document that does not fit is continued in the next sequence as a piece of its own, not dropped.
    - The last sequence is filled up with padding, itself one piece without labels, so that no token is lost. Only if it
      would hold a single token it is left out: there is nothing to learn in it, and it would cost a step all the same.
      So is a piece of a single token that would have a row of its own.

    Nothing is copied up front: a sequence is put together when it is asked for.

    Args:
        documents: The token ids of each document: a sequence of lists, of integer arrays `[tokens]` (memory-mapped ones
            stay so) or of tensors; or a list array of Arrow, such as
            `dataset.with_format("arrow")[:]["input_ids"]` of a tokenised dataset, which stays on the disk.
        context_length: Tokens of a sequence, 2 or more.
        pad_token_id: What fills the last sequence up. Nothing is learned from it: any token of the model does.
        own_rows: Each piece is a row, which ends where the piece does (`pad_rows` makes those of a batch equally long),
            for models in which documents of one row see each other.

    Item `i` holds `input_ids`, `position_ids` and `labels`, int64 `[context_length]` each, or `[tokens of the piece]`.

    Attributes:
        tokens: How many are in the sequences: all but those that would be alone in one and are not the only one.

    Raises:
        ValueError: An argument is out of its range, or a document is no sequence of token ids.
    """

    def __init__(self, documents: Any, context_length: int, pad_token_id: int, own_rows: bool = False) -> None:
        check_row(context_length, pad_token_id)
        self.context_length = context_length
        self.pad_token_id = pad_token_id
        self.own_rows = own_rows
        self.chunks, lengths = chunks_of(documents)
        self.chunk_starts = np.cumsum([0, *map(len, self.chunks)])
        self.document_starts = np.cumsum([0, *lengths])
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
            "rows": "padded" if self.own_rows else "packed",
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


class SampleRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples to learn answers from in rows: packed whole, or one a row.

    Args:
        samples: A sequence of dicts, none longer than a row: `input_ids`, and as many `labels`: the token itself where
            it is to be learned, -100 elsewhere. That of a first token counts as -100.
        context_length: Tokens of a packed row, 2 or more.
        pad_token_id: What fills packed rows up. Nothing is learned from it: any token of the model does.
        packed: Several whole samples a row, or one each. The latter end where the sample does: `pad_rows` makes those
            of one batch equally long.

    Item `i` holds `input_ids`, `position_ids` and `labels`, int64 `[tokens of the row]` each.

    Attributes:
        tokens, targets: Tokens of all samples, and how many of them are learned.

    Raises:
        ValueError: An argument is out of its range, or a sample is too long or has not as many labels as tokens.
    """

    def __init__(
        self, samples: Sequence[Mapping[str, Any]], context_length: int, pad_token_id: int, packed: bool
    ) -> None:
        check_row(context_length, pad_token_id)
        self.context_length = context_length
        self.pad_token_id = pad_token_id
        self.packed = packed
        self.samples = samples
        lengths, self.targets, digest = [], 0, hashlib.sha256()
        for number, sample in enumerate(samples):
            input_ids, labels = (
                token_ids(sample[name], f"{name} of sample {number}") for name in ("input_ids", "labels")
            )
            if not 0 < len(input_ids) == len(labels) <= context_length:
                raise ValueError(
                    f"sample {number} has {len(input_ids)} token ids and {len(labels)} labels: it must have as many "
                    f"labels as tokens, and from 1 to the {context_length} of a row"
                )
            lengths.append(len(input_ids))
            self.targets += int((labels[1:] != IGNORED_LABEL).sum())
            for values in (input_ids, labels):
                digest.update(len(values).to_bytes(8, "little") + values.astype("<i4").tobytes())
        self.rows = pack(lengths, context_length) if packed else [[sample] for sample in range(len(lengths))]
        self.tokens = sum(lengths)
        self._sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def padding(self) -> int:
        """Padding tokens at the ends of packed rows."""
        return len(self) * self.context_length - self.tokens if self.packed else 0

    def fingerprint(self) -> dict[str, Any]:
        """What tells the samples, and how they come into rows, from any other, as JSON."""
        return {
            "train_samples": len(self.samples),
            "train_tokens": self.tokens,
            "train_sha256": self._sha256,
            "rows": "packed" if self.packed else "padded",
        }

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pieces = [self._piece(self.samples[sample]) for sample in self.rows[index]]
        row = {name: torch.from_numpy(np.concatenate([piece[name] for piece in pieces])) for name in pieces[0]}
        return filled(row, self.context_length, self.pad_token_id) if self.packed else row

    def _piece(self, sample: Mapping[str, Any]) -> dict[str, np.ndarray]:
        input_ids, labels = (np.array(sample[name], dtype=np.int64) for name in ("input_ids", "labels"))
        labels[:1] = IGNORED_LABEL
        return {"input_ids": input_ids, "labels": labels, "position_ids": np.arange(len(input_ids))}
