"""The build: what it finds, what it says of what is missing, and the wheel it makes."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import longlora_ext

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("backend", ROOT / "cmake" / "backend.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("LONGLORA_TORCH_DIR", raising=False)
    return module


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
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.2, V11.2.152'\n")
    nvcc.chmod(0o755)
    says = configure(tmp_path / "old", f"-DNVCC={nvcc}")
    assert f"{nvcc} is version 11.2, 12.0 or newer needed: building the CPU kernels only" in says
    says = configure(tmp_path / "torch", f"-DTORCH_DIR={tmp_path}")
    assert "TORCH_DIR must be the folder of a torch" in says


def test_library_is_tied_to_no_python() -> None:
    """Loaded by torch under any CPython: nothing of Python's, and only libtorch of torch's, is linked."""
    library = Path(longlora_ext.__file__).with_name("_C.so")
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in needed.splitlines()}
    assert "libtorch.so" in names
    dynamic = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True, check=True).stdout
    linked = re.findall(r"NEEDED +(\S+)", dynamic)
    assert not [name for name in linked if re.match(r"libpython|libc10|libtorch_", name)], linked
    symbols = subprocess.run(["nm", "-D", "-u", str(library)], capture_output=True, text=True, check=True).stdout
    foreign = [
        line.split()[-1] for line in symbols.splitlines() if re.search(r" (Py|_Py|_ZN[0-9A-Z]*(2at|3c10|5torch))", line)
    ]
    assert not foreign, foreign


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources as a checkout has them."""
    ignored = shutil.ignore_patterns("build", ".git", "*.so", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "sources", ignore=ignored))


def build_wheel(sources: Path) -> tuple[Path, str]:
    """The wheel that `pip wheel .` makes, with build isolation, and what pip printed."""
    folder = sources.parent
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder), str(sources)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, result.stdout + result.stderr


@pytest.mark.full
def test_isolated_wheel(sources: Path, tmp_path: Path) -> None:
    """From a source distribution: one py3-none wheel with the library in it, which computes."""
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    wheel, _ = build_wheel(sdist)
    assert re.fullmatch(r"longlora_ext-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert "longlora_ext/_C.so" in archive.namelist()
        archive.extractall(tmp_path / "site")
    script = (
        "import torch, longlora_ext as l; x = torch.randn(3, 1, 32, 2, 8); print(l.__file__, l.s2attn(*x, 8).shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "site", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(tmp_path / "site") in result.stdout and "[1, 32, 2, 8]" in result.stdout


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_cuda_sources_are_compiled_where_nvcc_is(sources: Path) -> None:
    """With any CPU torch: a CUDA source added to csrc/cuda ends up in the library."""
    (sources / "csrc" / "cuda").mkdir(exist_ok=True)
    (sources / "csrc" / "cuda" / "probe.cu").write_text("__global__ void longlora_probe(float* x) { *x = 1; }\n")
    _, output = build_wheel(sources)
    assert "building the CUDA kernels as well" in output and "probe.cu" in output


@pytest.mark.full
def test_fresh_environment_then_editable(sources: Path, tmp_path: Path) -> None:
    """Where there is no torch, pip fetches one, here kept to the version of these tests by a constraint; then the
    editable install without isolation, in which an edit shows without a build."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    version = torch.__version__.partition("+")[0]
    constraint = tmp_path / "constraints.txt"
    constraint.write_text(f"torch=={version}\n")
    environment = os.environ | {
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "PIP_CONSTRAINT": str(constraint),
        "PIP_BUILD_CONSTRAINT": str(constraint),  # what newer pips read for the build's environment
    }

    def pip_install(*arguments: str) -> None:
        command = [venv / "bin" / "pip", "install", *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    def python(script: str) -> str:
        command = [venv / "bin" / "python", "-c", script]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    pip_install(str(sources))
    script = (
        "import torch, longlora_ext as l; print(torch.__version__, l.s2attn(*torch.randn(3, 1, 32, 2, 8), 8).shape)"
    )
    assert version in python(script) and "[1, 32, 2, 8]" in python(script)

    pip_install("setuptools>=77", "cmake", "ninja")
    pip_install("--no-deps", "--no-build-isolation", "-e", str(sources))
    (sources / "longlora_ext" / "edited.py").write_text("from longlora_ext import s2attn as edited\n")
    assert python("from longlora_ext.edited import edited; print(edited.__name__)").strip() == "s2attn"
