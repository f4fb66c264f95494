"""The build: what it finds, and what it says of what is missing."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from build_backend import NVCC, ROOT, TORCH, load_backend, make_nvcc, nvcc_release


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Looking around without an environment variable to tell it where, and without nvcc."""
    for name in ("LONGLORA_TORCH_DIR", "CUDA_HOME", "CUTLASS_INCLUDE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDACXX", "")
    return load_backend()


def test_installed_torch_is_found(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.find_torch() == TORCH
    # Under build isolation torch cannot be imported, but lies where the interpreter keeps its packages.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.find_torch() == TORCH
    assert backend._requires() == []


def test_torch_is_asked_for_where_there_is_none(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda key: str(tmp_path))
    assert backend._requires() == [f"torch>={backend.torch_floor()}"]


def test_old_torch_is_named(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cu126'\n")
    monkeypatch.setenv("LONGLORA_TORCH_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=rf"torch 2.9.1\+cu126 found in {tmp_path}, but 2.11 or newer is needed"):
        backend._requires()


def test_wrong_torch_folder_is_named(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LONGLORA_TORCH_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=f"LONGLORA_TORCH_DIR is {tmp_path}, but must be the folder of a torch"):
        backend.find_torch()


def test_nvcc_is_found(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CUDACXX before CUDA_HOME before PATH; CUDACXX empty, as the fixture has it, is none."""
    named, home, path = (make_nvcc(tmp_path / name / "bin") for name in ("named", "home", "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"), prepend=os.pathsep)
    assert backend.find_nvcc() is None
    monkeypatch.delenv("CUDACXX")
    assert backend.find_nvcc() == home
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert backend.find_nvcc() == path
    monkeypatch.setenv("CUDACXX", str(named))
    assert backend.find_nvcc() == named
    monkeypatch.setenv("CUDACXX", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match=f"CUDACXX is {tmp_path / 'none'}, but must be an nvcc, or empty"):
        backend.find_nvcc()


def test_old_nvcc_is_named(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for release, shown in (("11.8", "11.8"), ("of another kind", "unknown")):
        nvcc = make_nvcc(tmp_path / release, release)
        monkeypatch.setenv("CUDACXX", str(nvcc))
        assert backend.find_nvcc() is None
        says = f"{nvcc} is version {shown}, 12.0 or newer needed: building the CPU kernels only"
        assert says in capsys.readouterr().out


def test_cutlass_is_asked_for_where_nvcc_is(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backend, "find_torch", lambda: TORCH)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda key: str(tmp_path))
    assert backend._requires() == []  # no nvcc
    monkeypatch.setenv("CUDACXX", str(make_nvcc(tmp_path / "bin")))
    assert backend._requires() == [backend.CUTLASS]
    headers = tmp_path / "cutlass_library" / "source" / "include"  # as nvidia-cutlass lays them out
    (headers / "cute").mkdir(parents=True)
    monkeypatch.setenv("CUTLASS_INCLUDE", str(headers))
    with pytest.raises(SystemExit, match=f"CUTLASS_INCLUDE is {headers}, but must be the folder of CUTLASS' headers"):
        backend._requires()
    (headers / "cute" / "tensor.hpp").touch()
    assert backend._requires() == []
    monkeypatch.delenv("CUTLASS_INCLUDE")
    assert backend._requires() == []
    assert backend.find_cutlass() == headers


def test_lower_bounds_are_stated_once() -> None:
    """pyproject.toml alone knows the oldest torch: no other file of the build repeats it."""
    for path in [ROOT / "setup.py", ROOT / "CMakeLists.txt", *(ROOT / "cmake").iterdir()]:
        if path.is_file():
            assert not re.search(r"torch *[>=]+ *2\.|0x020b0000", path.read_text()), path


def configure(folder: Path, *options: str) -> str:
    """What CMake says; `folder` is the build's."""
    command = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DTORCH_DIR={TORCH}", "-DTORCH_FLOOR=2.11", *options]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return result.stdout + result.stderr


needs_cmake = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="no cmake and ninja")


@needs_cmake
def test_configure_says_what_is_missing(tmp_path: Path) -> None:
    assert "-- nvcc not found: building the CPU kernels only" in configure(tmp_path / "none", "-DNVCC=")
    says = configure(tmp_path / "cutlass", f"-DNVCC={make_nvcc(tmp_path / 'bin')}", f"-DCUTLASS_INCLUDE={tmp_path}")
    assert "CUTLASS_INCLUDE must be the folder of CUTLASS' headers" in says
    says = configure(tmp_path / "torch", f"-DTORCH_DIR={tmp_path}")
    assert "TORCH_DIR must be the folder of a torch" in says


@needs_cmake
@pytest.mark.skipif(not NVCC, reason="no nvcc")
@pytest.mark.parametrize(
    ("asked", "unit", "made"),
    [
        # An H100's, and that of the newest GPUs of 99 KiB, from the same PTX.
        (None, "forward_128_163", {"80 compute_80", "80 sm_80", "80 sm_90"}),
        (None, "forward_128_99", {"80 compute_80", "80 sm_80", "80 sm_120"}),
        (None, "forward_64_163", {"80 compute_80", "80 sm_80", "80 sm_90", "80 sm_120"}),
        ("80;90", "backward_64_99", {"80 compute_80", "80 sm_80", "90 compute_90", "90 sm_90"}),
        ("80-real", "backward_64_163", {"80 sm_80"}),
    ],
)
def test_code_is_for_common_gpus_or_what_is_asked_for(
    asked: str | None, unit: str, made: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "80 sm_120" in made and nvcc_release() < (12, 8):
        made = made - {"80 sm_120"}  # which it does not know
    monkeypatch.delenv("CUDAARCHS", raising=False)
    if asked:
        monkeypatch.setenv("CUDAARCHS", asked)
    (tmp_path / "cute").mkdir()
    (tmp_path / "cute" / "tensor.hpp").touch()
    configure(tmp_path / "build", f"-DNVCC={NVCC}", f"-DCUTLASS_INCLUDE={tmp_path}")
    (command,) = {
        entry["command"]
        for entry in json.loads((tmp_path / "build" / "compile_commands.json").read_text())
        if entry["file"].endswith(f"/{unit}.cu")
    }
    found = re.findall(r"arch=compute_(\d+),code=\[?([\w,]+)", command)
    assert {f"{virtual} {code}" for virtual, codes in found for code in codes.split(",")} == made
