"""What a report of a bug needs to say about the machine: `python -m longlora_ext.env`.

It says so, too, where the library is missing or cannot be loaded, and where packages are not installed. Of the
environment it shows a few variables by name, none with a password or token.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from longlora_ext._arguments import DTYPES

PACKAGES = (
    "longlora_ext", "torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "tokenizers", "safetensors",
    "bitsandbytes", "gguf", "liger-kernel", "numpy", "triton",
)  # fmt: skip
#: Variables that change what a run does, beside all that begin with LONGLORA_.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME", "DS_ACCELERATOR", "RANK", "LOCAL_RANK", "WORLD_SIZE",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM", "TORCH_EXTENSIONS_DIR", "LANG", "LC_ALL", "PYTHONPATH",
)  # fmt: skip
HEAD_DIMS = (64, 128, 256)  # for which the CUDA kernels are compiled


def report() -> str:
    """All of it, a line for each thing."""
    sections = {
        "versions": {"python": f"{platform.python_version()} ({sys.executable})", **_versions()},
        "machine": _machine(),
        "GPUs": _gpus(),
        "operator": _operator(),
        "environment": {
            name: os.environ[name]
            for name in sorted(os.environ)
            if name in VARIABLES or (name.startswith("LONGLORA_") and "TOKEN" not in name)
        },
    }
    lines = []
    for title, rows in sections.items():
        lines += [f"{title}", *(f"  {name + ':':<28} {' '.join(str(value).split())}" for name, value in rows.items())]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "torch's CUDA": torch.version.cuda or "none"}


def _machine() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "platform": platform.platform(),
        "CPU": f"{processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": f"{os.cpu_count()}, of which {len(os.sched_getaffinity(0))} may be used",
        "torch's threads": str(torch.get_num_threads()),
        "memory": f"{memory / 1e9:.1f} GB",
    }


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"found by torch": "none", "driver": _driver()}
    found = {"driver": _driver()}
    for index in range(torch.cuda.device_count()):
        gpu: Any = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.shared_memory_per_block_optin:,} bytes of shared memory for a block at most"
        )
    return found


def _driver() -> str:
    """The version of NVIDIA's driver, which torch does not know."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(asked[0]) is None:
        return "no nvidia-smi"
    done = subprocess.run(asked, capture_output=True, text=True)
    return ", ".join(sorted(set((done.stdout or done.stderr).split("\n")) - {""}))


def _operator() -> dict[str, str]:
    """Where the operator runs, and why it does not elsewhere."""
    try:
        from longlora_ext import ops
    except ImportError as error:
        return {"library": str(error)}
    library = Path(ops.__file__).with_name("_C.so")
    found = {
        "library": str(library),
        "compiled by": _compilers(library),
        "CUDA kernels": "in this build" if ops.has_cuda_kernels() else "not in this build",
        "CPU kernels": _instruction_set(),
    }
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        for dtype in DTYPES:
            found[f"{device}, {str(dtype).removeprefix('torch.')}"] = _where_it_runs(device, dtype)
    return found


def _where_it_runs(device: str, dtype: torch.dtype) -> str:
    found: dict[str, list[str]] = {}
    for head_dim in HEAD_DIMS:
        found.setdefault(_how_it_runs(device, dtype, head_dim), []).append(str(head_dim))
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"with head_dim {', '.join(head_dims)} {how}" for how, head_dims in found.items())


def _compilers(library: Path) -> str:
    """What nvcc and gcc leave in what they compile."""
    found = re.findall(rb"Cuda compilation tools, [^\0]+|GCC: [^\0]+", library.read_bytes())
    return ", ".join(sorted({name.decode(errors="replace") for name in found})) or "not known"


def _how_it_runs(device: str, dtype: torch.dtype, head_dim: int) -> str:
    from longlora_ext import ops

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ops.check_runs(device, dtype, head_dim)
    except Exception as error:
        return f"does not run: {str(error).splitlines()[0]}"
    why = ops.why_unsupported(device, dtype, head_dim)
    return "runs" if why is None else f"runs by torch's attention: {why}"


def _instruction_set() -> str:
    """The instructions of the CPU kernels that a process here takes, and could take.

    The library says which there are when it is asked for one that is none; a process asks once, so this is another.
    """
    code = "import torch, longlora_ext; q = torch.zeros(1, 2, 1, 8); longlora_ext.s2attn(q, q, q, 2)"
    environment = {**os.environ, "LONGLORA_CPU_ISA": "?"}
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "PYTHONPATH": paths}
    )
    _, said, supported = done.stderr.partition("this processor and build support: ")
    if not said:
        return "not known"
    names = supported.split("\n")[0].split(", ")
    wanted = os.environ.get("LONGLORA_CPU_ISA")
    taken = wanted if wanted in names else f"none, as LONGLORA_CPU_ISA is {wanted!r}" if wanted else names[0]
    return f"{taken} (of {', '.join(names)})"


if __name__ == "__main__":
    print(report())
