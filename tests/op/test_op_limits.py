"""What the op can run on is answered by the library beforehand, in the words that it would throw."""

import pytest
import torch

from longlora_ext import s2attn
from longlora_ext.ops import has_cuda_kernels


def why_unsupported(device: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, backward: bool = True) -> str:
    return torch.ops.longlora.why_unsupported(torch.device(device), dtype, head_dim, backward=backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 256])
def test_a_cpu_takes_every_head_dim_and_dtype(dtype: torch.dtype, head_dim: int) -> None:
    assert why_unsupported("cpu", dtype, head_dim) == why_unsupported("cpu:0", dtype, head_dim, backward=False) == ""


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.int32, 64), (torch.bool, 64), (torch.float32, 12), (torch.float32, 264), (torch.complex64, 12)],
)
def test_the_answer_is_what_the_kernels_throw(dtype: torch.dtype, head_dim: int) -> None:
    why = why_unsupported("cpu", dtype, head_dim)
    assert why == why_unsupported("cpu", dtype, head_dim, backward=False) != ""
    q = torch.zeros(1, 4, 2, head_dim, dtype=dtype)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.longlora.s2attn_fwd(q, q, q, 2, 1, None, 1.0, False)
    assert str(caught.value).splitlines()[0] == f"s2attn: {why}"


def test_head_dims_below_one_are_unsupported() -> None:
    for head_dim in (0, -8):
        assert why_unsupported("cpu", head_dim=head_dim) == (
            f"head_dim must be a multiple of 8 from 8 to 256, but is {head_dim}"
        )


def test_other_devices_are_told_of_the_two_that_there_are() -> None:
    for device in ("meta", "mps", "xpu"):
        assert why_unsupported(device) == "there are kernels for the CPU and CUDA alone; use attn_implementation='sdpa'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_none_is_supported() -> None:
    why = why_unsupported("cuda")
    if not has_cuda_kernels():
        assert why == "this build of longlora_ext has no CUDA kernels; use attn_implementation='sdpa' or the CPU"
    elif torch.version.cuda is None:
        assert why == "this torch was built without CUDA"
    else:
        assert why.startswith("asking ")  # CUDA's own words
    for backward in (False, True):  # what is wrong with the tensors comes first, as in the op
        if has_cuda_kernels():
            assert why_unsupported("cuda:0", torch.float32, backward=backward) == (
                "q must be bfloat16 or float16 on CUDA, but is Float; cast it, or use attn_implementation='sdpa'"
            )
            assert "but is 12" in why_unsupported("cuda:0", head_dim=12, backward=backward)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_that_is_supported_runs_the_op_and_another_says_why() -> None:
    for head_dim in (64, 128, 256):
        for backward in (False, True):
            why = why_unsupported("cuda", head_dim=head_dim, backward=backward)
            q = torch.randn(1, 64, 2, head_dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)

            def run(q: torch.Tensor = q, backward: bool = backward) -> None:
                out = s2attn(q, q, q, 32)
                if backward:
                    out.sum().backward()

            if why:
                with pytest.raises(RuntimeError) as caught:
                    run()
                assert why in str(caught.value)
            else:
                run()
