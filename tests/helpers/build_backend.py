"""The build's own backend, the library it made, and what GPU code is in one."""

import importlib.util
import re
import struct
import subprocess
from pathlib import Path
from types import ModuleType

import torch

import longlora_ext

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
LIBRARY = Path(longlora_ext.__file__).with_name("_C.so")


def load_backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("backend", ROOT / "cmake" / "backend.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NVCC = load_backend().find_nvcc()


def nvcc_release() -> tuple[int, ...]:
    says = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", says)
    assert found, says
    return tuple(map(int, found.groups()))


def make_nvcc(folder: Path, release: str = "12.4") -> Path:
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.152'\n")
    nvcc.chmod(0o755)
    return nvcc


def device_code(library: Path) -> set[tuple[str, int]]:
    """What the library holds for GPUs: ("code", 80) is sm_80's machine code, ("ptx", 80) what newer ones compile.

    nvcc's fat binaries: a magic number, sizes, then entries with kind, sizes and architecture."""
    binary, found, at = library.read_bytes(), set(), 0
    while (at := binary.find(struct.pack("<I", 0xBA55ED50), at)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", binary, at)
        at += header
        end = at + size
        while at < end:
            kind, _, header, size, _, _, architecture = struct.unpack_from("<HHIQQII", binary, at)
            found.add(({1: "ptx", 2: "code"}.get(kind, f"kind {kind}"), architecture))
            at += header + size
    return found
