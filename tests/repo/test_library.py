"""The library that was built: what it is linked to, which code is in it, and what its CUDA kernels refuse."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from build_backend import LIBRARY, ROOT, device_code
from longlora_ext.ops import has_cuda_kernels


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
