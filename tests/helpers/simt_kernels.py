"""The emulated CUDA kernels on torch's CPU tensors, called as csrc/ops.cpp calls the real ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

import simt_build
from simt_build import ELEMENTS, KERNELS, Kernel


@cache
def kernels(*wanted: Kernel, dtypes: Collection[str] = tuple(ELEMENTS)) -> ModuleType:
    """The module with these kernels, or with all."""
    return simt_build.load(simt_build.build_kernels(wanted or KERNELS, dtypes=dtypes))


def view(module: ModuleType, tensor: Tensor) -> object:
    assert tensor.stride(3) == 1
    return module.TensorView(tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2))


def contiguous(doc_start: Tensor | None) -> Tensor | None:
    return None if doc_start is None else doc_start.contiguous()


def problem(
    module: ModuleType,
    q: Tensor,
    k: Tensor,
    group_size: int,
    doc_start: Tensor | None,
    first_shifted_head: int | None,
    scale: float | None,
    sink: bool,
    window: int | None,
) -> object:
    batch, seqlen, heads, head_dim = q.shape
    seqlen_k = k.shape[1]
    assert doc_start is None or doc_start.is_contiguous()
    return module.Problem(
        batch=batch,
        seqlen=seqlen,
        seqlen_k=seqlen_k,
        heads=heads,
        kv_heads=k.shape[2],
        head_dim=head_dim,
        group_size=min(group_size, 2**30),
        first_shifted_head=heads // 2 if first_shifted_head is None else first_shifted_head,
        window=seqlen_k if window is None else min(window, seqlen_k),
        sink=sink,
        scale=1 / math.sqrt(head_dim) if scale is None else scale,
        doc_start=0 if doc_start is None else doc_start.data_ptr(),
    )


def forward(
    module: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    doc_start: Tensor | None = None,
    *,
    first_shifted_head: int | None = None,
    scale: float | None = None,
    sink: bool = False,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse). What the kernel leaves unwritten is NaN."""
    doc_start = contiguous(doc_start)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"))
    described = problem(module, q, k, group_size, doc_start, first_shifted_head, scale, sink, window)
    views = [view(module, tensor) for tensor in (q, k, v, out)]
    module.forward(described, q.dtype == torch.bfloat16, *views, lse.data_ptr())
    return out, lse


def backward(
    module: ModuleType,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group_size: int,
    doc_start: Tensor | None = None,
    *,
    first_shifted_head: int | None = None,
    scale: float | None = None,
    sink: bool = False,
    window: int | None = None,
    deterministic: bool = False,
    dlse: Tensor | None = None,
) -> Sequence[Tensor]:
    """(dq, dk, dv). What the kernel leaves unwritten, or reads before it wrote it, is NaN."""
    doc_start = contiguous(doc_start)
    dq, dk, dv = (torch.full(x.shape, float("nan"), dtype=x.dtype) for x in (q, k, v))
    delta = torch.full_like(lse, float("nan"))
    described = problem(module, q, k, group_size, doc_start, first_shifted_head, scale, sink, window)
    scratch = torch.full((module.dq_scratch_floats(described, deterministic),), float("nan"))
    sink_sums = torch.full((module.sink_sums_floats(described),), float("nan"))
    views = [view(module, tensor) for tensor in (dout, q, k, v, out, dq, dk, dv)]
    sink_weight, sink_ds = torch.full_like(delta, float("nan")), torch.full_like(delta, float("nan"))
    nothing = torch.empty(0)
    tensors = (lse, nothing if dlse is None else dlse, delta, sink_weight, sink_ds, scratch, sink_sums)
    pointers = [tensor.data_ptr() for tensor in tensors]
    module.backward(described, q.dtype == torch.bfloat16, deterministic, *views, *pointers)
    return dq, dk, dv
