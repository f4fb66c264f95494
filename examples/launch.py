"""How the program was started: alone, or as one of several processes; and what DeepSpeed needs before it
starts."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

#: The deepspeed launcher sets these.
BY_DEEPSPEED = "CROSS_RANK" in os.environ and "CROSS_SIZE" in os.environ

# Or DeepSpeed warns in every process that it found nothing else.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def say(*lines: str) -> None:
    """Print, on the first process only."""
    if RANK == 0:
        print(*lines, sep="\n", flush=True)


def fail(message: str) -> NoReturn:
    """End the program for a mistake of its user: one line from the first process, exit status 2 from all."""
    if RANK == 0:
        print(f"finetune_llama.py: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(10)  # a launcher stops all when the first one ends; that shall be the one that speaks
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(2)


def prepare_deepspeed() -> None:
    """Make sure that DeepSpeed can start, and say what it is going to do.

    On a CPU it compiles its communication op at first use, which takes half a minute, a C++ compiler and
    ninja. Without a launcher it needs the environment of a group of one process.

    Raises:
        ImportError: DeepSpeed, a compiler or ninja is missing.
    """
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ImportError(f"DeepSpeed is asked for, but it cannot be imported: {error}") from error
    if not torch.accelerator.is_available():
        # A console script of a virtual environment runs without that environment's programs on the path.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        compiler = os.environ.get("CXX", "c++")
        missing = [name for name in (compiler, "ninja") if shutil.which(name) is None]
        if missing:
            raise ImportError(
                f"{' and '.join(missing)} not found: on a CPU DeepSpeed compiles its communication op at "
                "first use. Install them, or start the program with python instead of deepspeed"
            )
        say(
            "starting DeepSpeed (at its first start on a CPU it compiles its communication op: half a minute)"
        )
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
