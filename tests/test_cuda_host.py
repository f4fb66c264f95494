"""The host's side of the CUDA kernels, as far as it shows without a GPU: the formula they share with all others, and
what an unfit device is told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import simt_kernels
from longlora_ext.reference import s2attn_mask
from simt_build import Kernel


def module():
    # Those of the fast tests of the kernels: a process has one such module.
    configs = (("bf16", 64), ("fp16", 128))
    return simt_kernels.kernels(*(Kernel(way, *config) for way in ("backward", "forward") for config in configs))


@settings(deadline=None)  # the first example builds the module
@given(seqlen=st.integers(1, 60), half=st.integers(1, 40), shifted=st.booleans(), cuts=st.sets(st.integers(1, 59)))
def test_the_formula_is_the_definition(seqlen: int, half: int, shifted: bool, cuts: set[int]) -> None:
    """groups.h, which the CPU and the CUDA kernels are compiled with, says where a row's keys begin."""
    starts = [max((cut for cut in cuts if cut <= i), default=0) for i in range(seqlen)]
    mask = s2attn_mask(seqlen, 2 * half, shifted, torch.tensor(starts))
    first = [module().first_key(i, starts[i], 2 * half, shifted) for i in range(seqlen)]
    assert first == mask.int().argmax(dim=-1).tolist()


def test_an_old_gpu_is_told_what_to_use_instead() -> None:
    q = torch.randn(1, 64, 2, 64, dtype=torch.bfloat16)
    module().pretend(7)
    try:
        with pytest.raises(RuntimeError, match=r"7\.0, .* need 8\.0 .*attn_implementation='sdpa'"):
            simt_kernels.forward(module(), q, q, q, 16)
    finally:
        module().pretend(8)
    assert simt_kernels.forward(module(), q, q, q, 16)[0].isfinite().all()
