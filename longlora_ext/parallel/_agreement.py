"""What the ranks of a call tell each other before it: whether it can be done, and where their first rows stand.

It is one small all-gather for each batch, not for each layer: what was agreed upon is kept as long as the tensor of
positions that all layers of a step share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longlora_ext.parallel._exchange import told

__all__ = ["agree"]

_agreed: Any = WeakTensorKeyDictionary()


def agree(
    name: str, error: str | None, call: dict[str, Any], position_ids: Tensor, group: dist.ProcessGroup
) -> tuple[tuple[int, ...], ...]:
    """Settle that all ranks make the same call, on rows that follow each other. Collective, unless it was asked before.

    Args:
        name: Of the function that is called.
        error: What is wrong with this rank's arguments, if anything is.
        call: What must be the same on all ranks, by name. Hashable.
        position_ids: [batch or 1, length] of this rank's rows.
        group: The ranks.

    Returns:
        For each rank the place of its first row in its document, in each sequence of the batch.

    Raises:
        ValueError: On every rank, if something is wrong on any.
        RuntimeError: A rank does not answer.
    """
    inference = isinstance(position_ids, Tensor) and position_ids.is_inference()
    key = (name, group, *call.items(), None if inference or error else position_ids._version)
    if error is None and not inference and (found := _agreed.get(position_ids, {}).get(key)):
        return found
    ends: tuple[list[int], list[int]] = ([], [])
    if error is None:
        error = _why_not_documents(position_ids)
        ends = (position_ids[:, 0].tolist(), position_ids[:, -1].tolist())
    answers: list[Any] = [None] * dist.get_world_size(group)
    with told(group):
        dist.all_gather_object(answers, (error, call, ends), group=group)
    if message := _disagreement(answers):
        raise ValueError(f"{name}: {message}")
    agreed = tuple(tuple(first) for _, _, (first, _) in answers)
    if not inference:
        _agreed.setdefault(position_ids, {})[key] = agreed
    return agreed


def _why_not_documents(position_ids: Tensor) -> str | None:
    """Why they are no places in documents, each counted from 0; those of the first rows are looked at together."""
    restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    bad = (restarts & (position_ids[:, 1:] != 0)).nonzero()
    if len(bad):
        row, token = bad[0].tolist()
        before, after = position_ids[row, token : token + 2].tolist()
        return f"position_ids must count each document from 0, but go from {before} to {after} at its token {token + 1}"
    if (position_ids[:, 0] < 0).any():
        return f"position_ids must not be negative, but begin with {int(position_ids[:, 0].min())}"
    return None


def _disagreement(answers: list[tuple[str | None, dict[str, Any], tuple[list[int], list[int]]]]) -> str | None:
    """What is wrong with the call, the same words on every rank."""
    for rank, (error, _, _) in enumerate(answers):
        if error is not None:
            return f"rank {rank} of {len(answers)}: {error}"
    (_, call, (first, _)), length = answers[0], answers[0][1]["seqlen"]
    for rank, (_, other, (its_first, _)) in enumerate(answers):
        for what, value in call.items():
            if other.get(what) != value:
                hint = "; the number of ranks must divide the sequence" if what == "seqlen" else ""
                its_value = other.get(what)
                return (
                    f"{what} must be the same on all ranks, but is {value} on rank 0, {its_value} on rank {rank}{hint}"
                )
        for row, position in enumerate(its_first):
            before = answers[rank - 1][2][1][row] if rank else -1
            if position > rank * length:
                return (
                    f"position_ids of rank {rank} begin with {position} in sequence {row}, but only {rank * length} "
                    "tokens precede them: each document must begin with 0, in the shared sequence"
                )
            if position not in (0, before + 1):
                return (
                    f"position_ids of rank {rank} begin with {position} in sequence {row}, but those of rank "
                    f"{rank - 1} end with {before}: ranks must hold the sequence in their order"
                )
    return None
