"""Samples to learn answers from, and how they come into rows: packed whole, or one a row.

A sample is a conversation as token ids with a label for each: the token itself where it is part of an answer, -100
elsewhere. `read_samples` makes them of files, `SampleRows` the rows that are trained on. As in `text.PackedSequences`
position ids restart at every sample and at padding, which is how the attention knows them apart.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from app.inputs import chat, columns, conversations, messages, template
from app.inputs.cache import cache_named
from app.inputs.template import ChatTemplate
from app.inputs.tokens import Tokenised
from longlora_ext.loss import IGNORED_LABEL

_IDS = datasets.Sequence(datasets.Value("int32"))
_NUMBER = datasets.Value("int64")
_NAMES = datasets.Sequence(datasets.Value("string"))
FEATURES = datasets.Features(
    {"input_ids": _IDS, "labels": _IDS, "learned": _NUMBER, "lost": _NUMBER, "conversation": _NUMBER}
    | {"ends": _IDS, "unread": _NAMES}
)

#: What makes the samples. `datasets` takes results from its cache as long as the function is the same that it calls,
#: and does not look at what that function calls.
_CODE = "".join(inspect.getsource(module) for module in (chat, columns, conversations, messages, template))


@dataclass(frozen=True)
class Samples(Tokenised):
    """Tokenised samples. `input_ids` has a column `labels` beside that of its name, and for each sample `learned`, how
    many of its tokens are answers, `lost`, how many did not fit into the context, `conversation`, the number of the one
    that it is of, `ends`, the special tokens that end its answers, and `unread`, the columns of its row that were left
    alone.

    Attributes:
        dropped: How many were left out, as their answers begin beyond the context.
    """

    dropped: int = 0

    @property
    def ends(self) -> list[int]:
        """The special tokens that end an answer in any of the samples, sorted."""
        return sorted({token for tokens in self.input_ids["ends"] for token in tokens})

    @property
    def unread(self) -> list[str]:
        """The columns of the files that were left alone in any of the samples' rows, sorted."""
        return sorted({name for names in self.input_ids["unread"] for name in names})

    def column(self, name: str) -> np.ndarray:
        """`learned`, `lost` or `conversation`, int64 [samples]."""
        return np.asarray(self.input_ids.select_columns([name]).with_format("numpy")[:][name], dtype=np.int64)

    def labels(self, sample: int) -> np.ndarray:
        """The labels of one sample, int64 [length]."""
        return np.asarray(self.input_ids[sample]["labels"], dtype=np.int64)


def read_samples(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, context_length: int, day: date | None = None
) -> Samples:
    """Read conversations as samples of at most `context_length` tokens.

    Args:
        sources: As for `load_conversations`.
        tokenizer: With a chat template.
        context_length: What is longer is cut there, and dropped if no answer is left.
        day: What the chat template takes for today; None: the day that it is. Samples of a template that prints it are
            in the cache for one day.

    Raises:
        FileNotFoundError: A source that is not there.
        ValueError: What cannot be read or understood, with the file, the row (counting from 1) and what is expected.
    """
    parts, first = [], 0
    if day is None and template.prints_date(tokenizer):
        day = date.today()
    writer = ChatTemplate(tokenizer, day)
    for name, table in conversations.load_conversations(sources):
        parts.append(_encoded(name, table, writer, context_length, first))
        first += len(table)
    rows = datasets.concatenate_datasets(parts)
    kept = np.flatnonzero(Samples(rows).column("learned"))
    if not len(kept):
        raise ValueError(
            f"{' '.join(sources)}: no answer begins within the context of {context_length:,} tokens (--context_length)"
        )
    return Samples(rows.select(kept), dropped=len(rows) - len(kept))


@cache_named()
def _encoded(
    name: str, rows: datasets.Dataset, writer: ChatTemplate, context_length: int, first: int
) -> datasets.Dataset:
    """The samples of one file, whose conversations are numbered from `first` on."""

    def encode_row(batch: dict[str, list[Any]], indices: list[int], code: str) -> dict[str, list[Any]]:
        (index,), (row,) = indices, batch["row"]
        try:
            found = conversations.conversation(json.loads(row))
            samples = chat.encode(found, writer)
        except ValueError as error:
            raise ValueError(f"{name}, row {index + 1}: {error}") from error
        cut = [np.asarray(sample, dtype=np.int32)[:, :context_length] for sample in samples]
        for sample in cut:
            sample[1, 0] = IGNORED_LABEL  # nothing stands before it to predict it from
        return {
            "input_ids": [sample[0] for sample in cut],
            "labels": [sample[1] for sample in cut],
            "learned": [int((sample[1] != IGNORED_LABEL).sum()) for sample in cut],
            "lost": [len(whole.input_ids) - part.shape[1] for whole, part in zip(samples, cut, strict=True)],
            "conversation": [first + index] * len(cut),
            "ends": [chat.ends(samples, found, writer.tokenizer)] * len(cut),
            "unread": [list(found.unread)] * len(cut),
        }

    return rows.map(
        encode_row,
        batched=True,
        batch_size=1,
        with_indices=True,
        fn_kwargs={"code": _CODE},
        remove_columns=rows.column_names,
        features=FEATURES,
        desc="reading conversations",
    )


def hold_out_samples(samples: Samples) -> tuple[Samples, Samples]:
    """`(train, held_out)`: every 20th conversation is held out, with all its samples; a single one is trained on."""
    rows, conversation = samples.input_ids, samples.column("conversation")
    numbers = np.unique(conversation)
    chosen = numbers[min(20, len(numbers)) - 1 :: 20] if len(numbers) > 1 else numbers[:0]
    held_out = np.isin(conversation, chosen)
    return (
        replace(samples, input_ids=rows.select(np.flatnonzero(~held_out))),
        replace(samples, input_ids=rows.select(np.flatnonzero(held_out))),
    )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put samples into as few rows as can be had easily: the longest first, each where it leaves the least room.

    Args:
        lengths: Tokens of each sample, at most `capacity`.
        capacity: Tokens of a row.

    Returns:
        The samples of each row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # tokens left in a row, and the row; sorted
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        place = bisect_left(rooms, (lengths[sample], 0))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        insort(rooms, (room - lengths[sample], row))
    return rows


class SampleRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The rows that are trained on.

    Args:
        samples: The samples, none longer than a row.
        context_length: Tokens of a packed row.
        pad_token_id: What fills packed rows up.
        packed: Several whole samples a row, or one each. The latter end where the sample does: `pad_rows` makes those
            of one batch equally long.

    Item `i` holds `input_ids`, `position_ids` and `labels`, int64 [length] each.
    """

    def __init__(self, samples: Samples, context_length: int, pad_token_id: int, packed: bool) -> None:
        self.context_length = context_length
        self.pad_token_id = pad_token_id
        self.packed = packed
        self.samples = samples.input_ids.with_format("numpy", columns=["input_ids", "labels"])
        lengths = samples.lengths.tolist()
        self.rows = pack(lengths, context_length) if packed else [[sample] for sample in range(len(lengths))]
        self.tokens = sum(lengths)
        self.targets = int(samples.column("learned").sum())

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def padding(self) -> int:
        """Padding tokens at the ends of packed rows."""
        return len(self) * self.context_length - self.tokens if self.packed else 0

    def fingerprint(self) -> dict[str, Any]:
        """What tells the samples, and how they come into rows, from any other, as JSON."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for values in (sample["input_ids"], sample["labels"]):
                digest.update(len(values).to_bytes(8, "little") + np.asarray(values).astype("<i4").tobytes())
        return {
            "train_samples": len(self.samples),
            "train_tokens": self.tokens,
            "train_sha256": digest.hexdigest(),
            "rows": "packed" if self.packed else "padded",
        }

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pieces = [self.samples[sample] for sample in self.rows[index]]
        columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in ("input_ids", "labels")}
        columns["position_ids"] = np.concatenate([np.arange(len(piece["input_ids"])) for piece in pieces])
        row = {name: torch.from_numpy(values.astype(np.int64)) for name, values in columns.items()}
        return _filled(row, self.context_length, self.pad_token_id) if self.packed else row


def pad_rows(rows: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch: rows of `input_ids`, `position_ids` and `labels`, filled up to the longest of them."""
    longest = max(len(row["input_ids"]) for row in rows)
    filled = [_filled(row, longest, pad_token_id) for row in rows]
    return {name: torch.stack([row[name] for row in filled]) for name in filled[0]}


def _filled(row: dict[str, torch.Tensor], length: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """A row with padding up to a length: a piece of its own, which nothing is learned from."""
    missing = length - len(row["input_ids"])
    padding = {
        "input_ids": torch.full((missing,), pad_token_id),
        "labels": torch.full((missing,), IGNORED_LABEL),
        "position_ids": torch.arange(missing),
    }
    return {name: torch.cat([values, padding[name]]) for name, values in row.items()}
