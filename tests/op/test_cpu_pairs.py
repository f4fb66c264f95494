"""The kernels that multiply bfloat16 in pairs and in tiles, on any processor: headers stand in for the instructions."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import longlora_ext

HERE = Path(__file__).resolve().parent
HELPERS = HERE.parent / "helpers"
TORCH = Path(torch.__file__).parent
KERNELS = """
#include "%s"
#include "cpu/kernels.cpp"
using namespace longlora::cpu::baseline;
static_assert(kPack<Multiplied<BFloat16>> == 2 && kTiles<Multiplied<BFloat16>> == %s, "not those that this is about");
"""
# Instruction set: what stands in for it, and the macros by which g++ says that it has it.
STAND_INS = {
    "avx512bf16": ("avx512_bf16.h", "false", ["-D__AVX512BF16__"]),
    "amx": ("amx.h", "true", ["-D__AVX512BF16__", "-D__AMX_BF16__"]),
}


CSRC = HERE.parents[1] / "csrc"
COMPILER = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wno-psabi", f"-I{HELPERS}", f"-I{CSRC}"]


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator for torch, which is the same with all kernels."""
    built = tmp_path_factory.mktemp("ops") / "ops.o"
    subprocess.run([*COMPILER, "-isystem", TORCH / "include", "-c", CSRC / "ops.cpp", "-o", built], check=True)
    return built


@pytest.fixture(scope="module")
def package_of(ops: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each is built once."""
    return cache(lambda name: build_package(tmp_path_factory.mktemp(name), name, ops))


def build_package(folder: Path, name: str, ops: Path) -> Path:
    """A folder with longlora_ext in it, of which these are the only kernels."""
    header, tiles, macros = STAND_INS[name]
    kernels = ["-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", *macros]
    kernels += ["-DLONGLORA_ISA=baseline", "-DLONGLORA_VECTOR_BYTES=64"]
    command = [*COMPILER, *kernels, "-c", "-x", "c++", "-", "-o", folder / "kernels.o"]
    subprocess.run(command, input=KERNELS % (header, tiles), text=True, check=True)
    copied = Path(shutil.copytree(Path(longlora_ext.__file__).parent, folder / "longlora_ext"))
    (copied / "_C.so").unlink()  # which a process may have mapped
    linked = ["-shared", CSRC / "cpu" / "dispatch.cpp", folder / "kernels.o", ops, "-o", copied / "_C.so"]
    subprocess.run([*COMPILER, *linked, f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch"], check=True)
    return folder


# The other dtypes' kernels are the same in both, and need one run at this width of vectors; any_shape has all dtypes.
@pytest.mark.parametrize(
    "name, chosen",
    [
        ("avx512bf16", "cpu and bfloat16"),
        ("amx", "cpu and bfloat16"),
        pytest.param("avx512bf16", "cpu and not bfloat16", marks=pytest.mark.full),
        pytest.param("amx", "cpu and any_shape", marks=pytest.mark.full),
    ],
)
def test_numerics(package_of: Callable[[str], Path], name: str, chosen: str) -> None:
    """Odd lengths, GQA, documents and head dims from 8 to 256, forward and backward, by the op's own tests."""
    package = package_of(name)
    tests = ["test_op_numerics.py", "test_op_not_finite.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen]
    environment = os.environ | {"PYTHONPATH": str(package)}
    where = [sys.executable, "-c", "import longlora_ext; print(longlora_ext.__file__)"]
    found = subprocess.run(where, env=environment, cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(package)), found
    result = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
