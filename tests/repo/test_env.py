"""Where the operator can run (`why_unsupported`), and the report on a machine (`python -m longlora_ext.env`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import longlora_ext
from app.models.suitable import check_kernels
from longlora_ext import env
from longlora_ext.ops import why_unsupported
from tiny_models import tiny_config


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_there_is_no_gpu() -> None:
    """What a GPU lacks, test_cuda_host.py asks of one that the emulator makes up."""
    with pytest.raises(ValueError, match=r"S2-Attn does not run here, on cuda in torch\.bfloat16: "):
        check_kernels(tiny_config(), torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("other", ["mps", "xpu", "hpu"])
def test_other_devices(other: str) -> None:
    assert "there are kernels for the CPU and CUDA alone" in str(why_unsupported(other, torch.bfloat16, 64))


@pytest.mark.filterwarnings("ignore:s2attn runs by torch")
@pytest.mark.parametrize("head_dim", [0, 4, 8, 12, 64, 100, 128, 250, 256, 257, 264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_on_a_cpu_it_says_what_kernels_do(dtype: torch.dtype, head_dim: int) -> None:
    """With another head dim than theirs it is padded, or runs without a kernel."""
    q = torch.zeros(1, 8, 1, head_dim, dtype=dtype)
    try:
        longlora_ext.s2attn(q, q, q, 8)
        runs = True
    except RuntimeError:
        runs = False
    assert runs == (dtype != torch.complex64 and head_dim > 0)
    assert (why_unsupported("cpu", dtype, head_dim) is None) == (runs and head_dim <= 256)


def test_what_runs_without_kernels_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env._how_it_runs("cpu", torch.float32, 64) == "runs"
    assert env._how_it_runs("cpu", torch.float32, 264).startswith("runs by torch's attention: head_dim must be a")
    monkeypatch.setattr(env, "HEAD_DIMS", (64, 128, 264))
    text = env._where_it_runs("cpu", torch.float32)
    assert text.startswith("with head_dim 64, 128 runs; with head_dim 264 runs by torch's attention: head_dim must be")


# The report -------------------------------------------------------------------------------------------------


def test_a_report_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGLORA_TRACEBACK", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = env.report()
    for name in ("python", "longlora_ext", "torch", "transformers", "peft", "safetensors", "numpy"):
        assert any(line.strip().startswith(f"{name}:") for line in text.splitlines()), name
    assert f"torch:{torch.__version__}" in text.replace(" ", "")
    assert "LONGLORA_TRACEBACK: 1" in " ".join(text.split()) and "HF_HUB_OFFLINE: 1" in " ".join(text.split())
    assert "secret" not in text
    assert "cpu, float32: runs" in " ".join(text.split())


def test_a_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    assert "no-such-package: not installed" in " ".join(env.report().split())


def test_gpus_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(major=8, minor=9, shared_memory_per_block_optin=101_376, name="a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(env, "_driver", lambda: "580.1")
    text = " ".join(env.report().split())
    assert "a GPU" in text and "compute capability 8.9" in text and "101,376 bytes of shared memory" in text
    assert "580.1" in text and "cuda:0, bfloat16: does not run" in text


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """The package as it is in a source tree that was never built."""
    package = Path(longlora_ext.__file__).parent
    shutil.copytree(package, tmp_path / "longlora_ext", ignore=shutil.ignore_patterns("_C.so*", "__pycache__"))
    return tmp_path


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=folder)


def test_without_its_library_the_package_reports_and_nothing_else(unbuilt: Path) -> None:
    done = python(unbuilt, "-m", "longlora_ext.env")
    assert done.returncode == 0, done.stderr
    assert "_C.so is missing: this is a source tree that was never built" in done.stdout
    assert f"torch: {torch.__version__}" in " ".join(done.stdout.split())
    done = python(unbuilt, "-c", "from longlora_ext import s2attn")
    assert done.returncode == 1 and "ImportError" in done.stderr and "run `pip install .` in it" in done.stderr


def test_a_library_that_does_not_load_says_why(unbuilt: Path) -> None:
    (unbuilt / "longlora_ext" / "_C.so").write_bytes(b"no library")
    done = python(unbuilt, "-m", "longlora_ext.env")
    assert done.returncode == 0, done.stderr
    assert "invalid ELF header" in done.stdout or "file too short" in done.stdout
    done = python(unbuilt, "-c", "import longlora_ext.attention")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("ImportError: ")


def test_what_the_package_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in longlora_ext.__all__:
        assert getattr(longlora_ext, name).__name__ == name and name in dir(longlora_ext)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = longlora_ext.nonsense


def test_the_version_is_that_of_the_installed_package(unbuilt: Path) -> None:
    print_it = "import longlora_ext; print(longlora_ext.__version__)"
    installed = version("longlora_ext")
    done = python(unbuilt, "-c", print_it)
    assert done.stdout == f"{installed}\n" and re.fullmatch(r"\d+\.\d+\.\d+", installed), done.stderr
    lacking = "import importlib.metadata as m; none = lambda name: m.distribution(name + '-none'); m.version = none"
    done = python(unbuilt, "-c", f"{lacking}\n{print_it}")
    assert done.stdout == "0+unknown\n", done.stderr


def test_importing_the_package_loads_the_operator_and_no_transformers() -> None:
    """In a process of its own: this one has imported everything."""
    code = (
        "import longlora_ext, sys, torch; torch.ops.longlora.s2attn; longlora_ext.s2attn;"
        "assert not {'transformers', 'peft'} & set(sys.modules);"
        "from longlora_ext import load; assert 'peft' in sys.modules"
    )
    done = python(Path(longlora_ext.__file__).parents[1], "-c", code)
    assert done.returncode == 0, done.stderr
