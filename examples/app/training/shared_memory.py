"""What DeepSpeed leaves in the memory of a machine.

On a CPU each of its processes makes a file of 66 MiB in /dev/shm, which all others map, and never removes it: it takes
memory until the machine is restarted. Once all have mapped it, the name can go, and the memory goes with the last of
them, however that ends.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from longlora_ext._processes import wait_for_all

SHARED_MEMORY = Path("/dev/shm")


class KeepNoName(TrainerCallback):
    """Takes the names away when a run begins to train: DeepSpeed is up by then."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Called on every process."""
        remove_names()


def remove_names() -> None:
    """Remove the name of what this process shares by DeepSpeed's op for CPUs, if anything. Collective."""
    if not dist.is_initialized():
        return
    wait_for_all()  # who has not mapped it yet would wait for it for ever
    where = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    name = "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *where, str(dist.get_rank())])
    (SHARED_MEMORY / name).unlink(missing_ok=True)
