"""The CUDA kernels in the emulator: which there are to test, and how their results are held against the definition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import simt_kernels
from longlora_ext.reference import s2attn_reference
from op_checks import Problem, assert_outputs_and_grads_close


class Config(NamedTuple):
    """The forward and the backward kernels of one dtype and padded head dim, for GPUs with so much shared memory."""

    dtype: str
    head_dim: int
    kib: int  # that a block may have


FAST = (Config("bf16", 64, 163), Config("fp16", 128, 99))
CONFIGS = [
    pytest.param(config, id="-".join(map(str, config)), marks=[] if config in FAST else pytest.mark.full)
    for config in map(Config._make, product(("bf16", "fp16"), (64, 128, 256), (163, 99)))
]
#: One dtype of each head dim and size. The other is the same source with another type.
ONE_DTYPE = ("bf16-64-163", "fp16-128-163", "bf16-256-163", "fp16-64-99", "fp16-128-99", "bf16-256-99")
TOKENS = {64: 400, 128: 400, 256: 200}  # by head dim: four tiles of keys in each kernel, or more
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CONFLICTS = ("ldmatrix_conflicts", "cp_async_conflicts", "load_conflicts", "store_conflicts")


class Attention(torch.autograd.Function):
    """The emulated kernels for autograd; what is not a tensor goes through `run`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
        out, lse = simt_kernels.forward(run.module, q, k, v, run.group_size, run.doc_start, **run.options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.run = run
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        run, saved = ctx.run, ctx.saved_tensors
        options = run.options | {"deterministic": run.deterministic}
        return *simt_kernels.backward(run.module, dout, *saved, run.group_size, run.doc_start, **options), None


class Run(NamedTuple):
    module: ModuleType
    group_size: int
    doc_start: Tensor | None
    options: dict[str, Any]
    deterministic: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Attention.apply(q, k, v, self)


def check(
    module: ModuleType, problem: Problem, doc_start: Tensor | None = None, deterministic: bool = False, seed: int = 0
) -> None:
    """Forward and backward against the definition, within the error bound of the op's tests."""
    q, k, v = problem.tensors()
    ours = Run(module, problem.group_size, doc_start, problem.kwargs(), deterministic)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn_reference(q, k, v, problem.group_size, doc_start, **problem.kwargs())[0]

    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    module.configure(seed)
    assert_outputs_and_grads_close(ours, reference, q, k, v, scale, str(problem))
    assert_no_bank_conflicts(module)


def assert_no_bank_conflicts(module: ModuleType) -> None:
    """Since the module was configured."""
    conflicts = {kind: module.counters()[kind] for kind in CONFLICTS}
    assert not any(conflicts.values()), f"bank conflicts: {conflicts}"


def starts_of(lengths: Sequence[int]) -> Tensor:
    """doc_start of documents of these lengths, one behind the other."""
    begins = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    return begins.repeat_interleave(torch.tensor(lengths)).to(torch.int32)
