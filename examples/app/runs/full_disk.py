"""What is said when the disk is full: every library reports it in another way."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from app.runs.checkpoints import complete_checkpoints
from app.runs.launch import fail

#: Why a disk takes no more, in the system's words, which end up in the messages of most libraries.
REASONS = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)))

#: torch says only which of its writers failed.
TORCH_WRITERS = ("PytorchStreamWriter failed", "inline_container.cc")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a disk that takes no more into one line that names the folder of the run and what of it is complete.

    Nothing needs to be saved here: checkpoints are marked when they are whole, and results appear when they are.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        text = str(error)
        reason = next((reason for reason in REASONS if reason in text), None)
        if reason is None and not any(writer in text for writer in TORCH_WRITERS):
            raise
        complete = [path.name for path in complete_checkpoints(folder).values()]
        fail(
            f"{folder} cannot be written to: {reason or os.strerror(errno.ENOSPC)}. The run has stopped; complete "
            f"checkpoints: {', '.join(complete) or 'none'}. Make room, then go on with --resume_from_checkpoint latest"
        )
