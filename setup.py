"""Drives CMake and ninja, and tags the wheel: one library on torch's stable ABI, for every CPython 3."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))
from backend import CUTLASS, check_torch, find_cutlass, find_nvcc, find_torch, torch_floor  # noqa: E402


class CMakeBuild(build_ext):
    """Builds longlora_ext/_C.so. The build folder is kept, so that a second build compiles what changed."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            sys.exit(f"longlora_ext: no torch found; install torch {torch_floor()} or newer first")
        check_torch(torch)
        nvcc = find_nvcc()
        cutlass = find_cutlass() if nvcc else None
        if nvcc and not cutlass:
            sys.exit(
                f"longlora_ext: {nvcc} needs CUTLASS' headers: pip install '{CUTLASS}', or name their folder in "
                "CUTLASS_INCLUDE; or set CUDACXX to nothing, to build the CPU kernels only"
            )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / "cmake"
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if not cmake or not ninja:
            sys.exit("longlora_ext: building needs cmake and ninja, and one is missing: pip install cmake ninja")
        cache = build / "CMakeCache.txt"
        if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build)  # of a checkout that has moved since
        # Paths are set anew each time: those of an isolated build are gone by the next.
        configure = [
            cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DTORCH_DIR={torch}", f"-DTORCH_FLOOR={torch_floor()}",
            *([f"-DNVCC={nvcc}", f"-DCUTLASS_INCLUDE={cutlass}"] if nvcc else ["-DNVCC="]),
        ]  # fmt: skip
        for step in (configure, [cmake, "--build", build]):
            if subprocess.run(step).returncode:
                sys.exit("longlora_ext: the build of the C++ library failed; CMake or the compiler says why above")
        # Into the wheel, and beside the sources, so that a Python started in the checkout finds it there too.
        # Renamed into place: a process that has the old library mapped keeps it.
        for folder in {target.parent, ROOT / "longlora_ext"}:
            folder.mkdir(parents=True, exist_ok=True)
            copied = shutil.copy2(build / "_C.so", folder / "_C.so.new")
            os.replace(copied, folder / target.name)


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("longlora_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
