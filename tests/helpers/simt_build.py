"""Builds modules of emulated kernels: CUDA sources compiled by g++ against the SIMT emulator of csrc/simt.

Objects and modules stay in build/simt. They are made anew when the compiler, its flags, or a file that they were made
from has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pybind11

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "csrc" / "simt"
BINDINGS = RUNTIME / "bindings.cpp"
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "simt"
CXX = shlex.split(os.environ.get("CXX", "g++"))
JOBS = int(os.environ.get("MAX_JOBS", "2"))  # a unit takes the compiler 3 GB

COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# -O1: -O0 runs 60 times slower, -O2 no faster. CuTe reads registers as other types than they were written as.
# Without collecting its garbage the compiler takes a fifth less time, and 3 GB.
KERNEL_FLAGS = [*COMMON_FLAGS, "-O1", "-fno-strict-aliasing", "--param=ggc-min-heapsize=8000000", f"-I{CUDA}"]
# Never instrumented: what it does to a thread's memory is that thread's doing, and it tells the sanitizers of fibers.
RUNTIME_FLAGS = [*COMMON_FLAGS, "-O3"]
# The stack is a thread's registers. To watch it too would take the compiler five times as long.
SANITIZER_FLAGS: dict[str | None, list[str]] = {
    None: [],
    "address": ["-fsanitize=address", "--param=asan-stack=0", "-g1"],
    "thread": ["-fsanitize=thread", "-g1"],
}
WANTED_HEADERS = {
    "cuda_bf16.h": "nvidia-cuda-runtime",
    "cuda/std/utility": "nvidia-cuda-cccl",
    "crt/host_defines.h": "nvidia-cuda-crt",
}


@cache
def include_flags() -> list[str]:
    """Of CUTLASS, of CUDA (a toolkit, or else PyPI's packages of its headers), and of Python and pybind11."""
    cutlass = importlib.util.find_spec("cutlass_library")
    if cutlass is None or cutlass.origin is None:
        raise RuntimeError("the emulated kernels need CUTLASS's headers: pip install nvidia-cutlass")
    folders = [Path(cutlass.origin).parent / "source" / "include", *cuda_includes()]
    folders += [Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
    return [flag for folder in folders for flag in ("-isystem", str(folder))]


def cuda_includes() -> list[Path]:
    toolkits = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
    nvidia = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    includes = [[toolkit / "include"] for toolkit in toolkits] + [sorted(nvidia.glob("*/include"))]
    missing: list[str] = []
    for group in includes:
        folders = [folder for include in group for folder in (include, include / "cccl") if folder.is_dir()]
        missing = [
            package for header, package in WANTED_HEADERS.items() if not any((f / header).is_file() for f in folders)
        ]
        if not missing:
            return folders
    raise RuntimeError(
        "the emulated kernels need CUDA's headers: set CUDA_HOME to a toolkit, or pip install " + " ".join(missing)
    )


@contextmanager
def locked() -> Iterator[None]:
    """One process builds at a time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str | Path]) -> None:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{result.stdout}{result.stderr}")


def digest(*parts: str | bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]


@cache
def compiler_version() -> str:
    return subprocess.run([*CXX, "--version"], capture_output=True, text=True, check=True).stdout


def compile_unit(source: Path, flags: list[str]) -> tuple[Path, str]:
    """The object, and a digest of all that went into it."""
    command = [*CXX, *flags, "-x", "c++", "-c", str(source)]
    stem = BUILD / f"{source.name.split('.')[0]}-{digest(*command)}"
    target, depends, stamp = (stem.with_suffix(suffix) for suffix in (".o", ".d", ".stamp"))

    def inputs() -> list[Path]:
        return [Path(file) for file in depends.read_text().replace("\\\n", " ").split()[1:]]

    def state() -> str:
        contents = [file.read_bytes() if file.is_file() else b"" for file in inputs()]
        return digest(*command, compiler_version(), *contents)

    if target.is_file() and stamp.is_file() and stamp.read_text() == (now := state()):
        return target, now
    stamp.unlink(missing_ok=True)
    started = time.time()
    run([*command, "-MD", "-MF", depends, "-o", target])
    now = state()
    if all(file.stat().st_mtime < started for file in inputs()):  # edited meanwhile: good for this once
        stamp.write_text(now)
    return target, now


def build(name: str, units: Sequence[Path], sanitizer: str | None = None) -> Path:
    """The extension module `name` from the emulator and `units`, one of which has PYBIND11_MODULE(name, ...)."""
    instrument = SANITIZER_FLAGS[sanitizer]
    runtime = sorted(set(RUNTIME.glob("*.cpp")) - {BINDINGS})
    jobs = [(unit, RUNTIME_FLAGS) for unit in runtime]
    jobs += [(unit, [*KERNEL_FLAGS, *instrument, *include_flags()]) for unit in units]
    with locked(), ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda job: compile_unit(*job), jobs))
        stem = f"{name}-{sanitizer}-{digest(*map(str, units))}"
        target = BUILD / f"{stem}-{digest(*(inputs for _, inputs in objects))}" / f"{name}.so"
        if not target.is_file():
            for old in BUILD.glob(f"{stem}-{'[0-9a-f]' * 16}"):
                shutil.rmtree(old)
            target.parent.mkdir()
            linked = target.with_suffix(".new")
            run([*CXX, "-shared", *instrument, "-o", linked, *(path for path, _ in objects)])
            linked.rename(target)
    return target


class Kernel(NamedTuple):
    """An instantiation for one or both dtypes, as CMake makes them from csrc/cuda/instantiate.cu.in."""

    direction: str
    head_dim: int
    kib: int  # of shared memory that a GPU offers a block


KERNELS = tuple(
    Kernel(*kernel)
    for kernel in product(("backward", "forward"), (256, 128, 64), (163, 99))
    if kernel != ("forward", 64, 99)  # its tile is that for 163 KiB
)
ELEMENTS = {"bf16": "bfloat16_t", "fp16": "half_t"}
#: Head dims and sizes whose kernels of a direction are one unit here: apart, two backward ones take the compiler half
#: as long again, 80 s for 53, and five forward ones twice as long. The first are those of the fast tier.
TOGETHER = (((64, 163), (128, 99)), ((128, 163), (256, 163)), ((64, 99), (256, 99)))
HEADERS = {"backward": "kernel_bwd.h", "forward": "kernel_fwd.h"}  # the longest first


def kernels_for(configs: Iterable[tuple[int, int]]) -> list[Kernel]:
    """What GPUs run, by head dim and shared memory: of each the backward and the forward kernel."""
    wanted = set()
    for config in configs:
        forward = Kernel("forward", *config)
        wanted |= {Kernel("backward", *config), forward if forward in KERNELS else forward._replace(kib=163)}
    return sorted(wanted)


ABSENT = {
    "forward": "template <> void launch_forward<cutlass::{element}, {head_dim}, {kib}>"
    "(const ForwardParams&, int64_t, void*) {{ absent(); }}",
    "backward": "template <> void launch_backward<cutlass::{element}, {head_dim}, {kib}>"
    "(const BackwardParams&, bool, int64_t, void*) {{ absent(); }}",
}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
    return path


def unit_of(kernels: Sequence[Kernel], dtypes: Sequence[str]) -> Path:
    """What CMake makes of the template for each of these kernels, without the dtypes that are not wanted."""
    left_out = tuple(f"<{element}," for dtype, element in ELEMENTS.items() if dtype not in dtypes)
    template = (CUDA / "instantiate.cu.in").read_text().splitlines(keepends=True)
    text = ""
    for kernel in kernels:
        part = "".join(line for line in template if not any(element in line for element in left_out))
        for key, value in {"HEADER": HEADERS[kernel.direction], **kernel._asdict()}.items():
            part = part.replace(f"@{key.upper()}@", str(value))
        text += part
    sizes = [f"{kernel.head_dim}_{kernel.kib}" for kernel in kernels]
    return write(BUILD / "units" / f"{'_'.join([kernels[0].direction, *sizes, *dtypes])}.cu", text)


def absent_kernels(there: Sequence[Kernel], dtypes: Sequence[str]) -> Path:
    """A unit that stands for all but these: they end with an error."""
    absent = [(k, dtype) for k in KERNELS for dtype in ELEMENTS if k not in there or dtype not in dtypes]
    lines = [
        "#include <stdexcept>",
        f'#include "{ROOT / "csrc" / "params.h"}"',
        "namespace cutlass { struct bfloat16_t; struct half_t; }",
        "namespace longlora::cuda {",
        "template <typename Element, int kHeadDim, int kKib>",
        "void launch_forward(const ForwardParams&, int64_t, void*);",
        "template <typename Element, int kHeadDim, int kKib>",
        "void launch_backward(const BackwardParams&, bool, int64_t, void*);",
        '[[maybe_unused]] static void absent() { throw std::logic_error("not among the kernels of this build"); }',
        *(ABSENT[k.direction].format(element=ELEMENTS[dtype], **k._asdict()) for k, dtype in absent),
        "}",
    ]
    return write(BUILD / "units" / f"absent_{digest(*lines)}.cpp", "\n".join(lines) + "\n")


def build_kernels(
    kernels: Sequence[Kernel] = KERNELS, sanitizer: str | None = None, dtypes: Iterable[str] = ELEMENTS
) -> Path:
    """The extension module `simt_kernels` of csrc/simt/bindings.cpp with these kernels."""
    dtypes = sorted(dtypes)
    groups = [[k for k in sorted(kernels) if k.direction == way and k[1:] in of] for way in HEADERS for of in TOGETHER]
    units = [unit_of(group, dtypes) for group in groups if group]
    units += [BINDINGS, CUDA / "dispatch.cu", absent_kernels(kernels, dtypes)]
    return build("simt_kernels", units, sanitizer)


def run_sanitized(sanitizer: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python so that it can load a module built for `sanitizer`, to the first finding: stderr has it."""

    def library(name: str) -> str:
        command = [*CXX, f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # The sanitizer must come before all others, and find libstdc++ when it looks for what it replaces.
    preload = " ".join(map(library, ({"address": "libasan.so", "thread": "libtsan.so"}[sanitizer], "libstdc++.so.6")))
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    options |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # whose synchronization TSan cannot see
    same_addresses = ["setarch", "-R"] if sanitizer == "thread" else []  # TSan does not bear with random ones
    command = [*same_addresses, sys.executable, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **options, "LD_PRELOAD": preload}, capture_output=True, text=True)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # pybind11 keeps one module of a name in a process, and gives it again for another file.
    assert module.__file__ == str(path), f"{path.stem} was loaded before, from {module.__file__}"
    return module
