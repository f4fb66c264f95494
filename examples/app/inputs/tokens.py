"""Documents as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import datasets
import numpy as np
import pyarrow.compute
from transformers import PreTrainedTokenizerBase

from app.inputs.cache import cache_named

BATCH_BYTES = 2**24  # of text that is tokenised at once, about


@dataclass(frozen=True)
class Tokenised:
    """Tokenised documents, and what was read to get them.

    Attributes:
        input_ids: One row a document, column `input_ids`: its token ids (int32).
        empty: How many documents had no text, or white space alone, and were left out.
    """

    input_ids: datasets.Dataset
    empty: int = 0

    @property
    def arrow_ids(self) -> pyarrow.ChunkedArray:
        """The documents' token ids, as Arrow holds them."""
        return self.input_ids.with_format("arrow")[:]["input_ids"]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return pyarrow.compute.list_value_length(self.arrow_ids).to_numpy().astype(np.int64)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    @property
    def largest_id(self) -> int:
        """The largest token id of all documents, -1 if there is none."""
        largest = (pyarrow.compute.max(chunk.flatten()).as_py() for chunk in self.arrow_ids.chunks)
        return max((token for token in largest if token is not None), default=-1)

    def ids(self, document: int) -> np.ndarray:
        """The token ids of one document, int64 [length]."""
        return np.asarray(self.input_ids[document]["input_ids"], dtype=np.int64)


SomeTokenised = TypeVar("SomeTokenised", bound=Tokenised)


@cache_named()
def tokenise(documents: datasets.Dataset | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tokenised:
    """Turn documents into token ids.

    Each document gets the special tokens that the tokenizer adds by itself and ends with the
    end-of-sequence token where the tokenizer has one.

    Args:
        documents: A dataset with a column `text`, or a list of texts.
        tokenizer: The model's tokenizer.

    Returns:
        The documents in the same order, less those without text, which are counted. White space alone is none.

    Raises:
        OSError: The cache cannot be written to.
    """
    if not isinstance(documents, datasets.Dataset):
        documents = datasets.Dataset.from_dict({"text": list(documents)})
    eos = tokenizer.eos_token_id

    def encode(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch["text"] if text and not text.isspace()]
        if not texts:
            return {"input_ids": []}
        rows = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
        return {"input_ids": [row if eos is None or row[-1:] == [eos] else [*row, eos] for row in rows]}

    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
    size = documents.data.nbytes // max(1, len(documents))
    batch_size = min(64, max(1, BATCH_BYTES // max(1, size)))
    rows = documents.map(
        encode, batched=True, batch_size=batch_size, remove_columns=["text"], features=features, desc="tokenising"
    )
    return Tokenised(rows, empty=len(documents) - len(rows))


def hold_out(documents: SomeTokenised, every: int = 20) -> tuple[SomeTokenised, SomeTokenised]:
    """Set documents aside to measure on.

    Args:
        documents: What there is, at least one document.
        every: One document in this many is held out, and never none. A single document gives up its last
            tenth.

    Returns:
        `(train, held_out)`.
    """
    rows = documents.input_ids
    if len(rows) == 1:
        ids = documents.ids(0).tolist()
        cut = len(ids) - max(1, len(ids) // 10)
        head, tail = (
            datasets.Dataset.from_dict({"input_ids": [part]}, features=rows.features) for part in (ids[:cut], ids[cut:])
        )
        return replace(documents, input_ids=head), replace(documents, input_ids=tail)
    held_out = np.arange(min(every, len(rows)) - 1, len(rows), every)
    train = np.setdiff1d(np.arange(len(rows)), held_out)
    return replace(documents, input_ids=rows.select(train)), replace(documents, input_ids=rows.select(held_out))
