"""What the emulated CUDA kernels read and write: any strides, far offsets, nothing beside the tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import simt_kernels
from emulated import DTYPES, Config, Run
from op_checks import Problem, outputs_and_grads


@pytest.mark.parametrize("layout", ["heads_first", "fused", "sliced", "expanded"])
def test_strided_inputs(module: ModuleType, config: Config, layout: str) -> None:
    dtype, size = DTYPES[config.dtype], config.head_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    if layout == "heads_first":
        q, k, v = (random(2, 2, 150, size).transpose(1, 2) for _ in range(3))
    elif layout == "fused":
        q, k, v = random(2, 150, 3, 2, size).unbind(2)
    elif layout == "sliced":
        q, k, v = (random(3, 170, 3, size + 8)[1:, 9:159, 1:, 8:] for _ in range(3))
    else:
        q, k, v = (random(1, 150, 1, size).expand(2, 150, 2, size) for _ in range(3))
    assert not q.is_contiguous()
    dout = random(2, 2, 150, size).transpose(1, 2)
    run = Run(module, 100, None, {}, deterministic=True)
    module.configure()
    actual = outputs_and_grads(run, q, k, v, dout)
    dense = outputs_and_grads(run, *(x.contiguous() for x in (q, k, v)), dout.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(actual, dense, strict=True))


@pytest.mark.parametrize(
    "shape, strides", [((2, 100), (2**31 + 8, 2048)), ((1, 390), (2048, 2**23 - 8))], ids=["batch", "rows"]
)
def test_offsets_beyond_32_bits(
    module: ModuleType, config: Config, shape: tuple[int, int], strides: tuple[int, int]
) -> None:
    """Sequences, or tiles, begin more than 2^31 elements behind the first. The memory between is never touched."""
    (batch, seqlen), size, dtype = shape, config.head_dim, DTYPES[config.dtype]
    storage = torch.empty((batch - 1) * strides[0] + seqlen * strides[1], dtype=dtype)
    places = ((batch, seqlen, 2, size), (*strides, size, 1))
    q, k, v, dout = (storage.as_strided(*places, 2 * size * i) for i in range(4))
    for x in (q, k, v, dout):
        x.copy_(torch.randn(x.shape))
    run = Run(module, 40, None, {}, deterministic=True)
    module.configure()
    actual = outputs_and_grads(run, q, k, v, dout)
    dense = outputs_and_grads(run, *(x.contiguous() for x in (q, k, v)), dout.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(actual, dense, strict=True))


class Guarded:
    """A tensor within a larger one full of `guard`."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, guard: float, margins: Sequence[int]) -> None:
        around = [n + 2 * margin for n, margin in zip(shape, margins, strict=True)]
        self.guard = guard
        self.whole = torch.full(around, guard, dtype=dtype)
        self.tensor = self.whole[tuple(slice(m, m + n) for n, m in zip(shape, margins, strict=True))]

    def intact(self) -> bool:
        outside = self.whole.clone()
        outside.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()).fill_(self.guard)
        return bool((outside == self.guard).all())


def test_nothing_beside_the_tensors(module: ModuleType, config: Config) -> None:
    """Inputs lie among NaN and outputs among guards, before, behind and between rows and heads."""
    shape = {"seqlen": 150, "heads": 2, "kv_heads": 1, "group_size": 80, "head_dim": config.head_dim - 8}
    problem = Problem(**shape, documents=True, dtype=DTYPES[config.dtype])

    def guarded(like: Tensor, guard: float) -> Guarded:
        guarded = Guarded(like.shape, like.dtype, guard, (1, 3, 1, 8) if like.dim() == 4 else (64,))
        guarded.tensor.copy_(like)
        return guarded

    q, k, v = problem.tensors()
    dout = torch.randn_like(q)
    garbage = torch.randint(-(2**31), 2**31 - 1, (1, 150)).to(torch.int32)
    backwards = torch.arange(150, 0, -1, dtype=torch.int32)[None]
    cases = [*product((None, problem.doc_start()), (False, True), (False, True))]
    # A doc_start that is none makes wrong results, and no more: each kernel reads it in one of these.
    cases += [(doc_start, both, both) for doc_start in (garbage, backwards) for both in (False, True)]
    for doc_start, deterministic, sink in cases:
        module.configure()
        window = 31 if sink else None
        described = simt_kernels.problem(module, q, k, 80, doc_start, None, None, sink, window)
        inputs = [guarded(x, math.nan) for x in (q, k, v, dout)]
        outputs = [guarded(torch.full_like(x, math.nan), 7.0) for x in (q, q, k, v)]
        floats = [2 * 150] * 4 + [
            module.dq_scratch_floats(described, deterministic),
            module.sink_sums_floats(described),
        ]
        scratch = [guarded(torch.full((n,), math.nan), 7.0) for n in floats]
        in_q, in_k, in_v, in_dout = (simt_kernels.view(module, x.tensor) for x in inputs)
        to_out, *to_grads = (simt_kernels.view(module, x.tensor) for x in outputs)
        to_lse, *to_scratch = (x.tensor.data_ptr() for x in scratch)
        is_bfloat16 = q.dtype == torch.bfloat16
        module.forward(described, is_bfloat16, in_q, in_k, in_v, to_out, to_lse)
        views = (in_dout, in_q, in_k, in_v, to_out, *to_grads)
        module.backward(described, is_bfloat16, deterministic, *views, to_lse, 0, *to_scratch)
        assert all(x.intact() for x in (*outputs, *scratch))

        # The same as where nothing is beside.
        pattern: dict[str, Any] = {"sink": sink, "window": window}
        out, lse = simt_kernels.forward(module, q, k, v, 80, doc_start, **pattern)
        pattern["deterministic"] = deterministic
        grads = simt_kernels.backward(module, dout, q, k, v, out, lse, 80, doc_start, **pattern)
        assert torch.equal(scratch[0].tensor.view_as(lse), lse) and torch.isfinite(out).all()
        for actual, expected in zip(outputs, (out, *grads), strict=True):
            torch.testing.assert_close(actual.tensor, expected, rtol=0, atol=0, equal_nan=True)
