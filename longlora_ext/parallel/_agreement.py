"""What the ranks of a call tell each other before it: whether it can be done, and where their first rows stand.

It is one small all-gather for each batch, not for each layer: what was agreed upon is kept as long as the tensor of
positions that all layers of a step share.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longlora_ext.parallel._exchange import told

__all__ = ["agree", "kept"]

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
        ValueError: On every rank, if something is wrong on any; of a later call with the same positions, on that one.
        RuntimeError: A rank does not answer.
    """
    key = (name, group, *call.items())
    if error is not None and any(known[:2] == key[:2] for known in kept(_agreed, position_ids)):
        raise ValueError(f"{name}: {error}")  # the others, who know this call, would not come to hear of it
    if error is None and (found := kept(_agreed, position_ids).get(key)):
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
    kept(_agreed, position_ids)[key] = agreed
    return agreed


def kept(store: Any, tensor: Tensor) -> dict[Any, Any]:
    """What is known of a tensor's present numbers, kept as long as it lives and is not written to."""
    if tensor.is_inference():  # of which nobody knows whether it was
        return {}
    version, known = store.get(tensor, (None, {}))
    if version != tensor._version:
        known = {}
        store[tensor] = (tensor._version, known)
    return known


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
    _, call, _ = answers[0]
    for rank, (_, other, _) in enumerate(answers):
        for what, value in call.items():
            if other[what] != value:
                hint = "; the number of ranks must divide the sequence" if what == "seqlen" else ""
                ours, theirs = f"{value} on rank 0", f"{other[what]} on rank {rank}"
                return f"{what} must be the same on all ranks, but is {ours} and {theirs}{hint}"
    return _why_not_in_order([ends for _, _, ends in answers], call["seqlen"])


def _why_not_in_order(ends: list[tuple[list[int], list[int]]], length: int) -> str | None:
    """Why ranks whose rows begin and end at such places of documents do not hold one sequence after the other."""
    for rank, (first, _) in enumerate(ends):
        for row, position in enumerate(first):
            if position > rank * length:
                return (
                    f"position_ids of rank {rank} begin with {position} in sequence {row}, but only {rank * length} "
                    "tokens precede them: each document must begin with 0, in the shared sequence"
                )
            before = ends[rank - 1][1][row] if rank else -1
            if position not in (0, before + 1):
                return (
                    f"position_ids of rank {rank} begin with {position} in sequence {row}, but those of rank "
                    f"{rank - 1} end with {before}: ranks must hold the sequence in their order"
                )
    return None
