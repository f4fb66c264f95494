"""What rows of documents and of samples have in common: what is checked, padding, and batches."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch

from longlora_ext.loss import IGNORED_LABEL


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


def pad_rows(rows: Sequence[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch of rows, each filled up to the longest of them: a collator, once `pad_token_id` is bound to it.

    Args:
        rows: Of `input_ids`, `position_ids` and `labels`, int64 `[tokens of the row]` each.
        pad_token_id: What fills them up: pieces of their own, with labels of -100.

    Returns:
        The same three, int64 `[rows, tokens of the longest]`.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    full = [filled(row, longest, pad_token_id) for row in rows]
    return {name: torch.stack([row[name] for row in full]) for name in full[0]}


def filled(row: dict[str, torch.Tensor], length: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """A row with padding up to a length: a piece of its own, which nothing is learned from."""
    missing = length - len(row["input_ids"])
    padding = {
        "input_ids": torch.full((missing,), pad_token_id),
        "labels": torch.full((missing,), IGNORED_LABEL),
        "position_ids": torch.arange(missing),
    }
    return {name: torch.cat([values, padding[name]]) for name, values in row.items()}


def check_row(context_length: int, pad_token_id: Any) -> None:
    """Raise `ValueError` if rows cannot be so long, or not be filled up with that."""
    if context_length < 2:
        raise ValueError(f"context_length must be 2 or more, got {context_length}")
    if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, Integral) or pad_token_id < 0:
        raise ValueError(
            f"pad_token_id must be a token id, got {pad_token_id!r}; if the tokenizer has no padding token, any token "
            "of the model does"
        )


def chunks_of(documents: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """The documents' token ids, in arrays that hold one document after the other, and the tokens of each document."""
    arrays = getattr(documents, "chunks", [documents])  # of Arrow's chunked arrays
    if all(hasattr(array, "value_lengths") for array in arrays):  # Arrow's list arrays
        lengths = [array.value_lengths().fill_null(0).to_numpy() for array in arrays]
        ids = [token_ids(array.flatten().to_numpy(), "documents") for array in arrays]
        return ids, np.concatenate([np.empty(0, np.int64), *lengths])
    ids = [token_ids(document, f"document {number}") for number, document in enumerate(documents)]
    return ids, np.array([len(document) for document in ids], np.int64)


def token_ids(values: Any, what: str) -> np.ndarray:
    """Integers as an array, which shares the memory of those that are an array already."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:  # such as lists of different lengths
        raise ValueError(f"{what} must be a sequence of integers: {error}") from error
    if array.ndim == 1 and not len(array):
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{what} must be a sequence of integers, but it is {type(values).__name__} with elements of dtype "
            f"{array.dtype} and shape {list(array.shape)}"
        )
    return array
