"""Work shared out among processes each of which holds the whole model: a command started alone, by torchrun or by
deepspeed.

They exchange results, no tensors, so one backend (gloo) does on any machine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from app.runs.launch import RANK, WORLD_SIZE, leave_group  # isort: skip  (first: sets what torch and DeepSpeed read at import)
import datasets
import torch.distributed as dist
import transformers

#: A process may wait long for the one with the most to do. One that dies is noticed by the launcher, not by waiting.
PATIENCE = timedelta(days=30)


@contextmanager
def together() -> Iterator[None]:
    """Bring the processes together, and part them at the end."""
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        leave_group()


def gathered(mine: dict[str, Any]) -> dict[str, Any]:
    """The entries of all processes' dictionaries, on the first process; elsewhere nothing."""
    if not dist.is_initialized():
        return mine
    parts: list[Any] | None = [None] * WORLD_SIZE if RANK == 0 else None
    dist.gather_object(mine, parts)
    return {name: entry for part in parts or [] for name, entry in part.items()}


def be_quiet() -> None:
    """Leave the screen to what a user wants to see: one process speaks, and libraries only of trouble."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if RANK != 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
