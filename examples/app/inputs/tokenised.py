"""Text as token ids: the interface that `Documents` (tokens.py) and `Samples` (samples.py) share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Generic, TypeVar

import datasets
import numpy as np
import pyarrow.compute

from longlora_ext.data import PackedSequences, SampleRows

#: One document, or one conversation, in this many is held out where no other text is given to measure on.
HELD_OUT_EVERY = 20

Rows = TypeVar("Rows", PackedSequences, SampleRows)


@dataclass(frozen=True)
class Tokenised(ABC, Generic[Rows]):
    """Documents to learn as a whole, or samples to learn answers from, as token ids.

    Attributes:
        dataset: One row for each, with its token ids (int32) in the column `input_ids`.
        noun: What one of them is called.
    """

    dataset: datasets.Dataset
    noun: ClassVar[str]

    @property
    def arrow_ids(self) -> pyarrow.ChunkedArray:
        """The token ids of each document or sample, as Arrow holds them."""
        return self.dataset.with_format("arrow")[:]["input_ids"]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64 [documents or samples]."""
        return pyarrow.compute.list_value_length(self.arrow_ids).to_numpy().astype(np.int64)

    @property
    def whole_lengths(self) -> np.ndarray:
        """The same before any was cut to the context."""
        return self.lengths

    @property
    def tokens(self) -> int:
        """Tokens of all."""
        return int(self.lengths.sum())

    @property
    def largest_id(self) -> int:
        """The largest token id of all, -1 if there is none."""
        largest = (pyarrow.compute.max(chunk.flatten()).as_py() for chunk in self.arrow_ids.chunks)
        return max((token for token in largest if token is not None), default=-1)

    @property
    def ends(self) -> list[int]:
        """The special tokens that end an answer, sorted; none where no answers are learned."""
        return []

    def ids(self, index: int) -> np.ndarray:
        """The token ids of one document or sample, int64 [length]."""
        return np.asarray(self.dataset[index]["input_ids"], dtype=np.int64)

    def select(self, which: np.ndarray) -> Tokenised[Rows]:
        """Some of them, by their indices."""
        return replace(self, dataset=self.dataset.select(which))

    @abstractmethod
    def hold_out(self) -> tuple[Tokenised[Rows], Tokenised[Rows]]:
        """Set every `HELD_OUT_EVERY`th aside to measure on: `(train, held_out)`."""

    @abstractmethod
    def rows(self, context_length: int, pad_token_id: int, packed: bool) -> Rows:
        """The rows to train on.

        Args:
            context_length: Tokens of a packed row, and the most of any other.
            pad_token_id: What fills rows up.
            packed: Several documents or samples share a row; else each has rows of its own.
        """

    def check_rows(self, rows: Rows) -> None:
        """Raise `ValueError` if there is nothing to learn from the rows made of this."""
        if not rows.targets:
            raise ValueError(f"there is nothing to learn from {rows.tokens} tokens, none with another before it")

    @abstractmethod
    def describe(self, rows: Rows) -> dict[str, str]:
        """What is trained on, and what of it is not: lines of the banner by their titles.

        Args:
            rows: The rows made of this.
        """

    @abstractmethod
    def to_measure(self, tokens: int, longest: int) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """Choose what to measure perplexity on.

        Args:
            tokens: How many tokens to take at most.
            longest: The longest context to measure, in tokens.

        Returns:
            Token ids of each document or sample, int64 [length], and which of them to score, as for
            `sliding_window_perplexity`: labels of the same shapes, or None for all.
        """


def joined(parts: Sequence[Tokenised[Rows]]) -> Tokenised[Rows]:
    """All of several, in their order. What else they count is added up."""
    counts = {field.name: sum(getattr(part, field.name) for part in parts) for field in fields(parts[0])[1:]}
    return replace(parts[0], dataset=datasets.concatenate_datasets([part.dataset for part in parts]), **counts)
