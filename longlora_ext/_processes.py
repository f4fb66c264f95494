"""What processes decide and do together: one acts, and if it fails there, all fail, so that none waits for ever.

Alone, or before a process group is up, each of these is the action itself. All others are collective: every process
calls them, in the same order. Programs must bring the group up before (accelerate's `PartialState`, or whatever asks
`TrainingArguments` for its device, does).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Found = TypeVar("Found")


def is_first_process() -> bool:
    """Whether this is the process that decides, and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        nccl = dist.get_backend() == "nccl"  # which would guess the device, and warn that it does
        dist.barrier(device_ids=[torch.cuda.current_device()] if nccl else None)


def on_first_process(action: Callable[[], Found]) -> Found:
    """Do something on the first process alone.

    Args:
        action: Called there. What it returns is pickled for the others.

    Returns:
        What the action returned, on every process.

    Raises:
        Exception: It failed: its own exception, on every process, or a `RuntimeError` with its text where it cannot be
            sent. Or what it returned cannot be pickled.
    """
    if not dist.is_initialized():
        return action()
    failure: Exception | None = None
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [pickle.dumps(action()), None]
        except Exception as error:
            failure, outcome = error, [None, _sendable(error)]
    dist.broadcast_object_list(outcome, src=0)
    if failure := failure or outcome[1]:
        raise failure
    return pickle.loads(outcome[0])


def first_process_first(action: Callable[[], Found]) -> Found:
    """What the action returns on each process, called on the first of each machine before the others.

    So the first fills a cache that the others then find full.

    Raises:
        Exception: It failed on some process: its own exception there and on every other (see [`fail_together`]).
    """
    is_first = not dist.is_initialized() or int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0
    found: list[Found] = []
    for its_turn in (is_first, not is_first):
        failure: Exception | None = None
        if its_turn:
            try:
                found = [action()]
            except Exception as error:
                failure = error
        fail_together(failure)
    return found[0]


def fail_together(failure: Exception | None) -> None:
    """Raise what failed on any process on all of them.

    Args:
        failure: What failed on this process, or nothing.

    Raises:
        Exception: `failure`, or that of the first process that has one; a `RuntimeError` with its text where it cannot
            be sent.
    """
    if dist.is_initialized():
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, None if failure is None else _sendable(failure))
        failure = failure or next(filter(None, failures), None)
    if failure is not None:
        raise failure


def _sendable(failure: Exception) -> Exception:
    """An exception that survives pickling: some want other arguments when they are made again."""
    try:
        if str(pickle.loads(pickle.dumps(failure))) == str(failure):
            return failure
    except Exception:  # whatever its class does
        pass
    return RuntimeError(f"another process failed: {type(failure).__name__}: {failure}")
