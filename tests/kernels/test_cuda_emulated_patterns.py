"""The emulated CUDA kernels with the sink, the window, and queries that are the last of the keys."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import simt_kernels
from emulated import DTYPES, Config, check
from longlora_ext.reference import s2attn_reference
from op_checks import Problem

PATTERNS: dict[str, dict[str, Any]] = {
    "sink": {"seqlen": 300, "heads": 4, "kv_heads": 2, "group_size": 60, "sink": True},
    "sink, scale, batch": {
        "batch": 2,
        "seqlen": 150,
        "heads": 2,
        "kv_heads": 1,
        "group_size": 20,
        "sink": True,
        "scale": 0.7,
    },
    "window": {"seqlen": 400, "heads": 2, "kv_heads": 1, "group_size": 1000, "window": 131},
    "window within groups": {"seqlen": 300, "heads": 2, "kv_heads": 2, "group_size": 100, "window": 37, "sink": True},
    "a key": {"seqlen": 200, "heads": 2, "kv_heads": 1, "group_size": 400, "window": 1, "sink": True},
    "last queries": {"seqlen": 170, "seqlen_k": 470, "heads": 2, "kv_heads": 1, "group_size": 200},
    "last queries, window": {
        "seqlen": 170,
        "seqlen_k": 601,
        "heads": 4,
        "kv_heads": 2,
        "group_size": 90,
        "sink": True,
        "window": 70,
    },
    "last query": {"seqlen": 1, "seqlen_k": 300, "heads": 2, "kv_heads": 1, "group_size": 90, "sink": True},
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(module: ModuleType, config: Config, pattern: str, documents: bool, deterministic: bool) -> None:
    """The sink, the window, queries that are the last of the keys: alone and together."""
    problem = Problem(**PATTERNS[pattern], documents=documents, head_dim=config.head_dim, dtype=DTYPES[config.dtype])
    doc_start = problem.doc_start()
    if doc_start is not None:  # with some documents that are long enough for a sink, over several tiles
        doc_start[:, problem.seqlen // 3 :] = problem.tokens - problem.seqlen + problem.seqlen // 3
    check(module, problem, doc_start, deterministic, list(PATTERNS).index(pattern))


def test_sinks_of_a_narrow_head(module: ModuleType, config: Config) -> None:
    shape = {"seqlen": 200, "heads": 2, "kv_heads": 1, "group_size": 60, "sink": True}
    for head_dim in (config.head_dim - 8, config.head_dim // 2 + 8):
        for deterministic in (False, True):
            check(module, Problem(**shape, head_dim=head_dim, dtype=DTYPES[config.dtype]), None, deterministic)


@pytest.mark.parametrize("group_size", [90, 400])
@pytest.mark.parametrize("began", [-3, -200, -(2**28)])
def test_documents_that_began_before_the_keys(module: ModuleType, config: Config, began: int, group_size: int) -> None:
    """They see no sink, where the kernels are asked for one all the same."""
    shape = {"seqlen": 200, "seqlen_k": 260, "heads": 2, "kv_heads": 1, "group_size": group_size}
    problem = Problem(**shape, head_dim=config.head_dim, dtype=DTYPES[config.dtype])
    doc_start = torch.full((1, 200), began, dtype=torch.int32)
    check(module, problem, doc_start)
    q, k, v = problem.tensors()
    outs = [simt_kernels.forward(module, q, k, v, group_size, doc_start, sink=sink)[0] for sink in (False, True)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
def test_gradient_of_log_sum_exp(module: ModuleType, config: Config, deterministic: bool) -> None:
    """It is subtracted from delta; the sink counts."""
    shape = {"seqlen": 200, "heads": 2, "kv_heads": 1, "group_size": 60, "sink": True}
    problem = Problem(**shape, head_dim=config.head_dim, dtype=DTYPES[config.dtype])
    q, k, v = problem.tensors()
    dout, dlse = torch.zeros_like(q), torch.randn(1, 2, 200)
    module.configure()
    out, lse = simt_kernels.forward(module, q, k, v, 60, sink=True)
    options: dict[str, Any] = {"sink": True, "deterministic": deterministic, "dlse": dlse}
    dq, dk, dv = simt_kernels.backward(module, dout, q, k, v, out, lse, 60, **options)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(s2attn_reference(*inputs, 60, sink=True)[1], inputs[:2], dlse.double())
    for a, b in zip((dq, dk), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3 * torch.finfo(a.dtype).eps * b.abs().max().item())
    assert not dv.any()
