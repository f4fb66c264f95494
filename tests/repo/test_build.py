"""The build: what it finds, what it says of what is missing, and the wheel it makes."""

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import longlora_ext
from longlora_ext.ops import has_cuda_kernels

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


def make_nvcc(folder: Path, release: str = "12.4") -> Path:
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.152'\n")
    nvcc.chmod(0o755)
    return nvcc


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
        (None, "forward_bf16_128_163", {"80 compute_80", "80 sm_80", "80 sm_90"}),
        (None, "forward_bf16_128_99", {"80 compute_80", "80 sm_80", "80 sm_120"}),
        (None, "forward_bf16_64_163", {"80 compute_80", "80 sm_80", "80 sm_90", "80 sm_120"}),
        ("80;90", "backward_fp16_64_99", {"80 compute_80", "80 sm_80", "90 compute_90", "90 sm_90"}),
        ("80-real", "backward_fp16_64_163", {"80 sm_80"}),
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


def test_library_is_tied_to_no_python() -> None:
    """Loaded by torch under any CPython: nothing of Python's, and only libtorch of torch's, is linked."""
    needed = subprocess.run(["ldd", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in needed.splitlines()}
    assert "libtorch.so" in names
    dynamic = subprocess.run(["objdump", "-p", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    linked = re.findall(r"NEEDED +(\S+)", dynamic)
    assert not [name for name in linked if re.match(r"libpython|libc10|libtorch_", name)], linked
    symbols = subprocess.run(["nm", "-D", "-u", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    foreign = [
        line.split()[-1] for line in symbols.splitlines() if re.search(r" (Py|_Py|_ZN[0-9A-Z]*(2at|3c10|5torch))", line)
    ]
    assert not foreign, foreign


def test_instruction_sets_share_no_code(tmp_path: Path) -> None:
    """Of functions that several objects hold, such as the standard library's templates, the linker keeps any one copy,
    and that might need AVX-512 everywhere. Nothing is inlined here, so none is missed by luck."""
    options = ["-O0", "-std=c++17", "-fopenmp", "-Wno-psabi", "-DLONGLORA_ISA=isa", "-DLONGLORA_VECTOR_BYTES=16"]
    source, made = ROOT / "csrc" / "cpu" / "kernels.cpp", tmp_path / "kernels.o"
    subprocess.run(["g++", *options, "-c", source, "-o", made], check=True)
    symbols = subprocess.run(["nm", "-C", made], capture_output=True, text=True, check=True).stdout
    visible = re.findall(r"^[0-9a-f]+ [A-Zuvw] (.*)", symbols, re.MULTILINE)
    assert [name for name in visible if "longlora::cpu::isa::" not in name] == ["DW.ref.__gxx_personality_v0"]
    assert "longlora::cpu::isa::kernels" in visible


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


def test_library_has_cuda_kernels_for_both_directions_or_none() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("longlora::s2attn_bwd", "CUDA") == has_cuda_kernels()
    if has_cuda_kernels():
        assert device_code(LIBRARY) >= {("code", 80), ("ptx", 80)}  # and sm_90's, or what CUDAARCHS asked for
    else:
        assert device_code(LIBRARY) == set()


def test_library_loads_under_any_torch() -> None:
    """What a torch without CUDA lacks is weak, and the CUDA runtime is linked in and not shown."""
    symbols = subprocess.run(["nm", "-D", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    kinds = dict(line.split()[-1:-3:-1] for line in symbols.splitlines())
    assert kinds.get("aoti_torch_get_current_cuda_stream") == ("w" if has_cuda_kernels() else None)
    assert not [name for name in kinds if re.match(r"cuda|__cuda|cu[A-Z]", name)]


@pytest.mark.skipif(not has_cuda_kernels(), reason="built without nvcc")
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((64, 2, 16), torch.float32, "q must be bfloat16 or float16 on CUDA, but is Float; cast it, or use .*sdpa"),
        ((64, 2, 16), torch.float64, "q must be bfloat16 or float16 on CUDA, but is Double; cast it, or use .*sdpa"),
        ((1 << 29, 2, 16), torch.bfloat16, "seqlen must be below 536870912 on CUDA, but is 536870912"),
        ((64, 1 << 20, 8), torch.bfloat16, r"heads \* head_dim must be below 8388608 on CUDA, but is 8388608"),
        pytest.param(
            (64, 2, 16),
            torch.bfloat16,
            "this torch was built without CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA"),
        ),
    ],
)
def test_cuda_kernel_refuses_before_it_starts(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    """No GPU is needed to call what is registered for CUDA: here it gets CPU tensors."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    q = torch.zeros(shape[-1], dtype=dtype).expand(1, *shape)
    with pytest.raises(RuntimeError, match=f"^s2attn: {message}"):
        torch.ops.longlora.s2attn_fwd.default.redispatch(cuda, q, q, q, 16, 1, None, 0.25, False)


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
