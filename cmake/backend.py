"""The PEP 517 build backend: setuptools', asking for torch, and CUTLASS for nvcc, only where there is none.

pip builds in an environment of its own, but with the target's interpreter, whose site-packages are thus known. A torch
found there is built against as it is. uv hides it: LONGLORA_TORCH_DIR then names the folder of the torch package.
What is found here is what setup.py tells CMake.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

ROOT = Path(__file__).resolve().parent.parent
CUTLASS = "nvidia-cutlass>=4.2,<5"
NVCC_FLOOR = (12, 0)  # the first with C++17 device code and sm_80 to sm_90 together


def torch_floor() -> str:
    """The oldest torch supported, from pyproject.toml, where it is stated."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found, "pyproject.toml states no lower bound for torch"
    return found[1]


def find_torch() -> Path | None:
    """The folder of the torch package to build against, without importing it."""
    if named := os.environ.get("LONGLORA_TORCH_DIR"):
        if not (Path(named) / "version.py").is_file():
            sys.exit(f"longlora_ext: LONGLORA_TORCH_DIR is {named}, but must be the folder of a torch package")
        return Path(named)
    return _find_package("torch", "version.py")


def _find_package(name: str, marker: str) -> Path | None:
    """The folder of a package that can be imported, or that the target environment has, with the file `marker`."""
    spec = importlib.util.find_spec(name)
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    folders += [Path(sysconfig.get_path(key)) / name for key in ("purelib", "platlib")]
    return next((folder for folder in folders if (folder / marker).is_file()), None)


def torch_version(folder: Path) -> str:
    found = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return found[1] if found else "unknown"


def check_torch(folder: Path) -> None:
    """Stops the build, in one line, where torch is too old."""

    def number(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version)[:2])

    version, floor = torch_version(folder), torch_floor()
    if number(version) < number(floor):
        sys.exit(f"longlora_ext: torch {version} found in {folder}, but {floor} or newer is needed")


def find_nvcc() -> Path | None:
    """CUDACXX, as in CMake; set to nothing, it asks for the CPU kernels alone."""
    named = os.environ.get("CUDACXX")
    if named == "":
        return None
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [f"{cuda_home}/bin", os.environ.get("PATH", os.defpath)]
    found = shutil.which(named or "nvcc", path=os.pathsep.join(places))
    if found is None:
        if named:
            sys.exit(f"longlora_ext: CUDACXX is {named}, but must be an nvcc, or empty to build the CPU kernels only")
        return None
    says = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", says)
    if release and (int(release[1]), int(release[2])) >= NVCC_FLOOR:
        return Path(found)
    version, floor = (
        ".".join(map(str, numbers)) for numbers in (release.groups() if release else ["unknown"], NVCC_FLOOR)
    )
    print(f"longlora_ext: {found} is version {version}, {floor} or newer needed: building the CPU kernels only")
    return None


def find_cutlass() -> Path | None:
    """The folder of CUTLASS' headers."""
    marker = "cute/tensor.hpp"
    if named := os.environ.get("CUTLASS_INCLUDE"):
        if not (Path(named) / marker).is_file():
            sys.exit(f"longlora_ext: CUTLASS_INCLUDE is {named}, but must be the folder of CUTLASS' headers")
        return Path(named)
    package = _find_package("cutlass_library", f"source/include/{marker}")
    return package / "source" / "include" if package else None


def _requires() -> list[str]:
    requires = []
    if folder := find_torch():
        check_torch(folder)
    else:
        requires.append(f"torch>={torch_floor()}")
    if find_nvcc() and not find_cutlass():
        requires.append(CUTLASS)
    return requires


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _requires()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _requires()
