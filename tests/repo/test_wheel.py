"""The wheel that the build makes: with build isolation, from a source distribution, and editable."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from build_backend import ROOT, TORCH, device_code, make_nvcc


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources as a checkout has them."""
    ignored = shutil.ignore_patterns("build", ".git", "*.so", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "sources", ignore=ignored))


@pytest.fixture(autouse=True)
def unoptimized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are compiled in 12 seconds of a processor, not in 62: they are asked whether they are there and run.
    Optimized they are in the library that all other tests run, which CI builds by `pip install .` too."""
    compiler = tmp_path / "unoptimized"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def test_build_without_isolation_says_how_to_get_cutlass(sources: Path, tmp_path: Path) -> None:
    """Where no backend could ask for it."""
    nvcc = make_nvcc(tmp_path / "bin")
    script = """
import runpy, sys
sys.path.insert(0, "cmake")
import backend
backend.find_cutlass = lambda: None
sys.argv = ["setup.py", "-q", "build_ext"]
runpy.run_path("setup.py")
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=sources, env=os.environ | {"CUDACXX": str(nvcc)}, capture_output=True, text=True,
    )  # fmt: skip
    (line,) = result.stderr.splitlines()
    assert result.returncode and f"{nvcc} needs CUTLASS' headers: pip install 'nvidia-cutlass>=4.2,<5', or" in line


def build_wheel(sources: Path) -> tuple[Path, str]:
    """The wheel that `pip wheel .` makes, with build isolation, and what pip printed."""
    folder = sources.parent
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder), str(sources)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, result.stdout + result.stderr


def run_in_wheel(wheel: Path, folder: Path, script: str) -> str:
    """What a script prints where the wheel's longlora_ext is the one that is imported."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    script = f"import torch, longlora_ext as l; assert l.__file__.startswith({str(folder)!r}), l.__file__; {script}"
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def run_without_compilers(wheel: Path, folder: Path, script: str) -> str:
    """What a script prints in a new environment in which pip has installed the wheel, with nothing on the path.

    Its torch is that of these tests.
    """
    venv, empty = folder / "venv", folder / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (site,) = venv.glob("lib/python3.*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(f"{TORCH.parent}\n")
    environment = {"PATH": str(empty), "HOME": str(folder)}
    install = ["-m", "pip", "install", "--no-index", "--no-deps", "--ignore-installed", wheel]
    script = (
        "import shutil; assert not any(map(shutil.which, ('g++', 'cc', 'nvcc', 'cmake', 'ninja'))); import torch; "
        f"import longlora_ext as l; assert l.__file__.startswith({str(site)!r}), l.__file__; {script}"
    )
    for arguments in (install, ["-c", script]):
        command = [venv / "bin" / "python", *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
def test_isolated_wheel(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a source distribution that has all sources: one py3-none wheel with the library in it, which computes, also
    where no compiler is."""
    monkeypatch.setenv("CUDACXX", "")
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    files = [path for top in ("csrc", "cmake") for path in (sources / top).rglob("*") if path.is_file()]
    needed = {str(path.relative_to(sources)) for path in files if path.suffix != ".pyc"}
    assert needed <= packed, needed - packed
    wheel, output = build_wheel(sdist)
    assert "building the CPU kernels only" in output
    assert re.fullmatch(r"longlora_ext-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    script = "x = torch.randn(3, 1, 32, 2, 8); print(l.s2attn(*x, 8).shape)"
    assert "[1, 32, 2, 8]" in run_in_wheel(wheel, tmp_path / "site", script)
    train = "x = torch.randn(3, 1, 32, 2, 8, requires_grad=True); l.s2attn(*x, 8).sum().backward(); print(x.grad.shape)"
    assert "[3, 1, 32, 2, 8]" in run_without_compilers(wheel, tmp_path, train)
    assert device_code(tmp_path / "site" / "longlora_ext" / "_C.so") == set()


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
        "CUDACXX": "",
        "PIP_CONSTRAINT": str(constraint),
        "PIP_BUILD_CONSTRAINT": str(constraint),  # what newer pips read for the build's environment
        "PIP_NO_COMPILE": "1",  # of all files of torch and transformers few are imported
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
    printed = python(script)
    assert version in printed and "[1, 32, 2, 8]" in printed

    pip_install("setuptools>=77", "cmake", "ninja")
    pip_install("--no-deps", "--no-build-isolation", "-e", str(sources))
    (sources / "longlora_ext" / "edited.py").write_text("from longlora_ext import s2attn as edited\n")
    assert python("from longlora_ext.edited import edited; print(edited.__name__)").strip() == "s2attn"
