"""Samples to learn answers from.

A sample is a conversation as token ids with a label for each: the token itself where it is part of an answer, -100
elsewhere. `read_samples` makes them of files, `Samples.rows` the rows that are trained on.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from app.inputs import chat, columns, conversations, messages, template
from app.inputs.cache import cache_named
from app.inputs.template import ChatTemplate
from app.inputs.tokenised import HELD_OUT_EVERY, Tokenised
from app.runs.launch import say
from longlora_ext.data import SampleRows
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
class Samples(Tokenised[SampleRows]):
    """Tokenised samples.

    `dataset` has a column `labels` beside `input_ids`, and for each sample `learned`, how many of its tokens are
    answers, `lost`, how many did not fit into the context, `conversation`, the number of the one that it is of, `ends`,
    the special tokens that end its answers, and `unread`, the columns of its row that were left alone.

    Attributes:
        dropped: How many were left out, as their answers begin beyond the context.
    """

    dropped: int = 0
    noun = "sample"

    @property
    def whole_lengths(self) -> np.ndarray:
        return self.lengths + self.column("lost")

    @property
    def ends(self) -> list[int]:
        """The special tokens that end an answer in any of the samples, sorted."""
        return sorted({token for tokens in self.dataset["ends"] for token in tokens})

    @property
    def unread(self) -> list[str]:
        """The columns of the files that were left alone in any of the samples' rows, sorted."""
        return sorted({name for names in self.dataset["unread"] for name in names})

    def column(self, name: str) -> np.ndarray:
        """`learned`, `lost` or `conversation`, int64 [samples]."""
        return np.asarray(self.dataset.select_columns([name]).with_format("numpy")[:][name], dtype=np.int64)

    def labels(self, sample: int) -> np.ndarray:
        """The labels of one sample, int64 [length]."""
        return np.asarray(self.dataset[sample]["labels"], dtype=np.int64)

    def hold_out(self) -> tuple[Samples, Samples]:
        """Set every 20th conversation aside, with all its samples. A single one is trained on.

        Returns:
            `(train, held_out)`.
        """
        conversation = self.column("conversation")
        numbers = np.unique(conversation)
        chosen = numbers[min(HELD_OUT_EVERY, len(numbers)) - 1 :: HELD_OUT_EVERY] if len(numbers) > 1 else numbers[:0]
        held_out = np.isin(conversation, chosen)
        return (
            replace(self, dataset=self.dataset.select(np.flatnonzero(~held_out))),
            replace(self, dataset=self.dataset.select(np.flatnonzero(held_out))),
        )

    def rows(self, context_length: int, pad_token_id: int, packed: bool) -> SampleRows:
        """Whole samples packed into rows, or one in each."""
        arrays: Any = self.dataset.with_format("numpy", columns=["input_ids", "labels"])
        return SampleRows(arrays, context_length, pad_token_id, packed=packed)

    def describe(self, rows: SampleRows) -> dict[str, str]:
        length, lost = rows.context_length, self.column("lost")
        packed = f"{len(rows):,} of {length:,} tokens, {rows.padding:,} of them padding, samples packed whole"
        return {
            "samples": f"{len(lost):,} with {self.tokens:,} tokens, {rows.targets:,} of them in answers",
            "too long": f"{(lost > 0).sum():,} truncated to {length:,} tokens, {lost.sum():,} tokens lost; "
            f"{self.dropped:,} dropped, their answers begin beyond that",
            "rows": packed if rows.packed else f"{len(rows):,}, one for each sample",
            **({"not read": f"columns {', '.join(self.unread)}"} if self.unread else {}),
        }

    def to_measure(self, tokens: int, longest: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Choose samples in their order, each whole, whatever the `longest` context is. Answers alone are scored."""
        fitting = np.flatnonzero(self.lengths <= tokens)
        chosen = fitting[np.cumsum(self.lengths[fitting]) <= tokens].tolist()
        if tokens and not chosen:
            say("no held-out sample is there, or short enough for --eval_tokens, to measure perplexity on")
        return [self.ids(sample) for sample in chosen], [self.labels(sample) for sample in chosen]


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
