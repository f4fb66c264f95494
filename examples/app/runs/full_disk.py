"""A full disk: each library reports it in another way."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from app.runs.checkpoints import complete_checkpoints
from app.runs.errors import one_clear_error
from app.runs.run_folder import RESULTS

#: Why a disk takes no more, in the system's words, which end up in the messages of most libraries.
REASONS = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)))

#: torch says only which of its writers failed.
TORCH_WRITERS = ("PytorchStreamWriter failed", "inline_container.cc")


class FullDisk(OSError):
    """The disk takes no more."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """End the program with one line for a full disk: the folder of the run, and which checkpoints are complete.

    Nothing needs to be saved here: checkpoints are marked when they are whole, and results appear when they are.
    """
    with one_clear_error(only=FullDisk), _recognised(folder):
        yield


@contextmanager
def _recognised(folder: Path) -> Iterator[None]:
    """Raise `FullDisk` for what libraries raise for it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        reason = _reason(str(error))
        if reason is None:
            raise
        complete = ", ".join(path.name for path in complete_checkpoints(folder).values()) or "none"
        made = next((f"{result}/" for result in RESULTS if (folder / result).exists()), None)
        advice = "Make room, then go on with --resume_from_checkpoint latest"
        if made:
            lacking = f"{made} is complete, and what was to be measured of it is missing"
            advice = lacking if complete == "none" else f"{lacking}. {advice}"
        raise FullDisk(
            f"{folder} cannot be written to: {reason}. The run has stopped; complete checkpoints: {complete}. {advice}"
        ) from error


def _reason(text: str) -> str | None:
    """Why nothing could be written, if an error with this text is about that."""
    by_torch = any(writer in text for writer in TORCH_WRITERS)
    return next((reason for reason in REASONS if reason in text), os.strerror(errno.ENOSPC) if by_torch else None)
