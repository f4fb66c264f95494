"""How the program was started: alone, or as one of several processes; and what DeepSpeed needs before it
starts."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

# Read when torch is loaded. Threads that spin while they wait take the cores from those they wait for, wherever the
# machine has anything else to do; on two shared cores that doubles the time of a step.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from filelock import FileLock

RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

#: The option of TrainingArguments that goes with `prepare_deepspeed`.
USE_CONFIGURED_STATE = {"use_configured_state": not torch.accelerator.is_available()}

# Or DeepSpeed warns in every process that it found nothing else.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


#: Who speaks in `fail`: each program puts its name here.
program = "finetune_llama.py"


def by_deepspeed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the deepspeed launcher started this process; it sets these variables."""
    return "CROSS_RANK" in environment and "CROSS_SIZE" in environment


def launcher(environment: Mapping[str, str] = os.environ) -> str:
    """What stands before the program's name in a command that starts as many processes.

    On several machines what no process knows is in capitals: the file of hosts, or the address where they meet.
    """
    processes = int(environment.get("WORLD_SIZE", 1))
    if by_deepspeed(environment):
        several = int(environment["CROSS_SIZE"]) > 1
        return "deepspeed --hostfile HOSTFILE" if several else f"deepspeed --num_accelerators {processes}"
    nodes = int(environment.get("GROUP_WORLD_SIZE", 1))
    if nodes > 1:
        meeting = "--rdzv_backend c10d --rdzv_endpoint HOST:PORT"
        return f"torchrun --nnodes {nodes} --nproc_per_node {processes // nodes} {meeting}"
    return f"torchrun --nproc_per_node {processes}" if processes > 1 else "python"


def say(*lines: str) -> None:
    """Print, on the first process only."""
    if RANK == 0:
        print(*lines, sep="\n", flush=True)


#: The variable with which a program shows where an error came from.
TRACEBACK = "LONGLORA_TRACEBACK"


def show_traceback() -> None:
    """Print where the error that is handled just now came from, or else where this is; if the user wants it.

    That is what `LONGLORA_TRACEBACK=1` asks for. Set to 0, false, no or off, or empty, it asks for nothing.
    """
    if os.environ.get(TRACEBACK, "").strip().lower() in ("", "0", "false", "no", "off"):
        return
    if error := sys.exc_info()[1]:
        traceback.print_exception(error)
    else:
        traceback.print_stack(sys._getframe(1))


def fail(message: str) -> NoReturn:
    """End the program for a mistake of its user: one line from the first process, exit status 2 from all.

    A launcher stops all when one ends. So the others wait, and speak only if they are still there: the mistake is then
    theirs alone. `LONGLORA_TRACEBACK=1` shows before the line where it came from.
    """
    if RANK != 0:
        time.sleep(10)
    show_traceback()
    who = "" if RANK == 0 else f"process {RANK}: "
    print(f"{program}: error: {who}{message}", file=sys.stderr, flush=True)
    leave_group()
    sys.exit(2)


def stay_alone(does: str) -> None:
    """End the program if a launcher has started several processes; `does` says what one of them does."""
    if WORLD_SIZE > 1:
        fail(f"one process {does}: start it with python")


def leave_group() -> None:
    """Take the process group down, if one is up.

    That holds Python's lock while it waits for gloo's threads (torch 2.13), and a thread that has just sent a tensor
    wants the lock to let go of it: without a moment for that, processes that were done hung now and then.
    """
    if torch.distributed.is_initialized():
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def prepare_deepspeed() -> None:
    """Make sure that DeepSpeed can start.

    On a CPU it compiles its communication op at first use, which takes half a minute, a C++ compiler and ninja. Without
    a launcher it needs the environment of a group of one process.

    Raises:
        ImportError: DeepSpeed, a compiler or ninja is missing, or the op cannot be compiled.
    """
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ImportError(f"DeepSpeed is asked for, but it cannot be imported: {error}") from error
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    if not torch.accelerator.is_available():
        _compile_communication_op()
        _join_on_cpu()


def prepare_fsdp(on_cpu: bool, load_once: bool) -> None:
    """Make sure that the processes can share a model by FSDP.

    Args:
        on_cpu: Bring the process group up here, for accelerate to take as it finds it (`use_configured_state`). Left to
            itself accelerate takes no notice of FSDP on a CPU, and each process keeps the whole model.
        load_once: Let transformers read the weights on the first process of a machine alone. It looks at the
            environment for that, where accelerate's launcher would say so.
    """
    if load_once:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    if on_cpu:
        from accelerate import DistributedType, PartialState

        PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.MULTI_GPU


def _join_on_cpu() -> None:
    """Bring the process group up, which accelerate takes as it finds it (`USE_CONFIGURED_STATE`).

    Left to itself accelerate knows no backend for DeepSpeed on CPUs, and takes each of several processes for a run of
    its own.
    """
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]


def _compile_communication_op() -> None:
    """Load DeepSpeed's op for CPUs, compiling it if need be, from a folder that belongs to these very versions.

    In the folder that torch takes by default, the op of one DeepSpeed is mistaken for that of another, and a process
    that is killed while it compiles leaves a lock that all later ones wait for. Here the processes take turns by a lock
    that ends with its owner, so who has the turn knows such a leftover for what it is.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return
    # A console script of a virtual environment runs without that environment's programs on the path.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]  # it may be "ccache g++"
    missing = [name for name in (compiler[0], "ninja") if shutil.which(name) is None]
    if missing:
        raise ImportError(
            f"{' and '.join(missing)} not found: on a CPU DeepSpeed compiles its communication op at first use. "
            "Install them, or start the program with python instead of deepspeed"
        )
    versions = f"deepspeed-{deepspeed.__version__}-torch-{torch.__version__}-{sys.implementation.cache_tag}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longlora_ext" / versions
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache)))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "turn", fallback_to_soft=False):
        if folder == cache:  # in a folder of the user's, others may be compiling
            for leftover in folder.glob("*/lock"):
                leftover.unlink()
        if not list(folder.glob("*/*.so")):
            say("compiling DeepSpeed's communication op for CPUs: half a minute, this once")
        if len(compiler) > 1:  # torch takes the whole of CXX for the name of one program
            script = folder / "cxx"
            script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@"\n')
            script.chmod(0o755)
            os.environ["CXX"] = str(script)
        try:
            builder.load(verbose=False)
        except RuntimeError as error:
            raise ImportError(f"DeepSpeed's communication op for CPUs cannot be compiled: {error}") from error
