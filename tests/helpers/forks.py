"""Starts Python programs, one process or several, in forks of a process that has imported what they need.

examples/finetune_llama.py imports for seven of the ten seconds that its smallest run takes. Programs whose start is
what a test is about are started by subprocess.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from patience import patience

#: Other people's modules that the programs need. What is not among them is imported in the fork.
PROGRAMS = (
    "torch.distributed.checkpoint", "torch.distributed.fsdp", "datasets", "deepspeed", "matplotlib.pyplot", "peft",
    "transformers.trainer", "transformers.models.llama.modeling_llama", "transformers.integrations.deepspeed",
)  # fmt: skip
#: Variables that are read when a library is loaded: with other values it is loaded by another parent.
READ_ON_IMPORT = ("CUDA", "DS_", "HF_", "LD_", "MKL", "MPL", "OMP", "PYTHON", "TORCH", "TRANSFORMERS")


def loading(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The part of an environment that is read when a library is loaded."""
    names = {name for name in environment if name.startswith(READ_ON_IMPORT)} - {"PYTHONPATH"}
    return tuple((name, environment[name]) for name in sorted(names))


@cache
def parent(modules: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """The process to be forked. It ends with this one, whose end closes its input."""
    command = [sys.executable, str(Path(__file__).with_name("forking.py")), *modules]
    env, pipes = os.environ | dict(environment), {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=env, text=True, start_new_session=True, **pipes)


def ask(process: subprocess.Popen[str], job: str) -> int | None:
    """The exit code of a job; None: it went on for too long, and was killed with its parent."""
    assert process.stdin and process.stdout
    print(job, file=process.stdin, flush=True)
    if not select.select([process.stdout], [], [], patience())[0]:
        os.killpg(process.pid, signal.SIGKILL)
        parent.cache_clear()
        return None
    answer = process.stdout.readline()
    assert answer, f"the process to be forked has ended with {process.wait()}"
    return int(answer)


def ranks(environment: Mapping[str, str], processes: int | None) -> list[Mapping[str, str]]:
    """The environments that torchrun gives so many processes on one machine; without a number, that of python."""
    if processes is None:
        return [environment]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    return [{**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run(
    words: Sequence[object], environment: Mapping[str, str], processes: int | None = None,
    modules: tuple[str, ...] = PROGRAMS, folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a program to its end.

    Args:
        words: What stands behind `python` or `torchrun`: a script, -m and a module, or -c and code; and the arguments.
        environment: All of it.
        processes: How many torchrun would start; default: one, by python.
        modules: What their parent has imported.
        folder: To run in; default: the present one.

    Returns:
        The exit code of the first process that failed, or 0; and what all have printed.
    """
    if torch.cuda.is_available():  # asking for a GPU has touched the driver, which forbids forks
        launcher = [sys.executable]
        if processes is not None:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, *map(str, words)]
        return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=patience())
    environments = ranks(environment, processes)
    with tempfile.TemporaryDirectory() as printed:
        out, err = Path(printed) / "out", Path(printed) / "err"
        job = {"words": [*map(str, words)], "folder": str(folder or Path.cwd()), "environments": environments}
        code = ask(parent(modules, loading(environment)), json.dumps(job | {"out": str(out), "err": str(err)}))
        output = [file.read_text(errors="replace") for file in (out, err)]
    if code is None:
        raise subprocess.TimeoutExpired(job["words"], patience(), *output)
    return subprocess.CompletedProcess(job["words"], code, *output)
