"""The CUDA kernels, run on a CPU by the emulator of csrc/simt: right against the definition, without a bank conflict.

Here the kernels of two dtypes, head dims and classes of GPU stand for all; `--full` compiles and runs every one.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import simt_kernels
from emulated import DTYPES, Config, check, starts_of
from longlora_ext.reference import s2attn_reference
from op_checks import Problem, assert_close_to_reference

SHAPES: dict[str, dict[str, Any]] = {
    "a token": {"seqlen": 1, "heads": 2, "kv_heads": 1, "group_size": 2},
    "groups of two": {"seqlen": 150, "heads": 2, "kv_heads": 2, "group_size": 2},
    "group beyond the end": {"seqlen": 130, "heads": 2, "kv_heads": 1, "group_size": 1000},
    "whole tiles": {"seqlen": 384, "heads": 2, "kv_heads": 2, "group_size": 256},
    "many tiles, ragged": {"seqlen": 600, "heads": 2, "kv_heads": 1, "group_size": 480},
    "dense": {"seqlen": 300, "heads": 2, "kv_heads": 2, "group_size": 2**40, "first_shifted_head": 2},
    "all shifted": {"seqlen": 300, "heads": 2, "kv_heads": 2, "group_size": 200, "first_shifted_head": 0, "scale": 0.7},
    "no scores": {"seqlen": 150, "heads": 2, "kv_heads": 2, "group_size": 100, "scale": 0.0},
    "GQA, mixed": {"seqlen": 170, "heads": 6, "kv_heads": 2, "group_size": 100, "first_shifted_head": 1},
    "a row past a group": {"seqlen": 301, "heads": 2, "kv_heads": 1, "group_size": 100},
    "MQA, batch": {"batch": 2, "seqlen": 150, "heads": 4, "kv_heads": 1, "group_size": 110},
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(module: ModuleType, config: Config, shape: str, deterministic: bool) -> None:
    problem = Problem(**SHAPES[shape], head_dim=config.head_dim, dtype=DTYPES[config.dtype])
    check(module, problem, deterministic=deterministic, seed=list(SHAPES).index(shape))


@pytest.mark.other_dtype
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("shape", ["a token", "many tiles, ragged", "GQA, mixed"])
def test_shapes_of_the_other_dtype(module: ModuleType, config: Config, shape: str, deterministic: bool) -> None:
    """Which tiles there are does not depend on it: sums over one and over many, of one head and of several."""
    test_shapes(module, config, shape, deterministic)


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES)
def test_other_seeds(module: ModuleType, config: Config, shape: str) -> None:
    """The order of blocks, warps and lanes changes nothing, with documents either."""
    problem = Problem(**SHAPES[shape], documents=True, head_dim=config.head_dim, dtype=DTYPES[config.dtype])
    seed = 100 + list(SHAPES).index(shape)
    check(module, problem, problem.doc_start(), deterministic=seed % 2 == 1, seed=seed)


@pytest.mark.parametrize("columns", [8, 24, 56])
def test_head_dims_between(module: ModuleType, config: Config, columns: int) -> None:
    """They go into the next that there is a kernel for."""
    head_dim = config.head_dim // 2 * (config.head_dim > 64) + columns
    shape = {"seqlen": 200, "heads": 2, "kv_heads": 1, "group_size": 150}
    for deterministic in (False, True):
        check(module, Problem(**shape, head_dim=head_dim, dtype=DTYPES[config.dtype]), deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("group_size", [20, 600])
def test_documents(module: ModuleType, config: Config, group_size: int, deterministic: bool) -> None:
    """Borders within tiles and on them, documents of one token and of several tiles, rows cut differently."""
    rows = [starts_of([1, 63, 36, 27, 261, 12]), starts_of([3] * 60 + [220])]
    shape = {"batch": 2, "seqlen": 400, "heads": 2, "kv_heads": 1, "group_size": group_size}
    problem = Problem(**shape, head_dim=config.head_dim, dtype=DTYPES[config.dtype])
    check(module, problem, torch.stack(rows), deterministic)


def test_log_sum_exp(module: ModuleType, config: Config) -> None:
    shape = {"batch": 2, "seqlen": 300, "heads": 4, "kv_heads": 2, "group_size": 180}
    problem = Problem(**shape, documents=True, head_dim=config.head_dim, dtype=DTYPES[config.dtype])
    q, k, v = problem.tensors()
    module.configure()
    for doc_start, sink in ((problem.doc_start(), False), (None, True)):
        options: dict[str, Any] = {"scale": 0.25, "sink": sink}
        _, lse = simt_kernels.forward(module, q, k, v, 180, doc_start, **options)
        _, plain = s2attn_reference(q.float(), k.float(), v.float(), 180, doc_start, **options)
        _, exact = s2attn_reference(q.double(), k.double(), v.double(), 180, doc_start, **options)
        assert_close_to_reference(lse, plain, exact)


@pytest.mark.parametrize("pattern", [{"group_size": 400}, {"group_size": 150, "sink": True}], ids=["dense", "sink"])
def test_large_scores_stay_exact(module: ModuleType, config: Config, pattern: dict[str, Any]) -> None:
    """Scores that overflow exp, rising and falling along the keys."""
    q, k, v = Problem(seqlen=400, head_dim=config.head_dim, dtype=DTYPES[config.dtype]).tensors()
    k *= torch.linspace(-100, 100, 400).to(k.dtype)[None, :, None, None]
    module.configure()
    out, _ = simt_kernels.forward(module, q, k, v, **pattern)
    exact, _ = s2attn_reference(q.double(), k.double(), v.double(), **pattern)
    plain, _ = s2attn_reference(q, k, v, **pattern)
    assert_close_to_reference(out, plain, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(module: ModuleType, config: Config, value: float) -> None:
    """In the rows that see it, and in no other."""
    q, k, v = Problem(seqlen=200, group_size=400, head_dim=config.head_dim, dtype=DTYPES[config.dtype]).tensors()
    k[:, 5] = value
    module.configure()
    out, _ = simt_kernels.forward(module, q.abs(), k, v, 400, first_shifted_head=2)
    expected, _ = s2attn_reference(q.abs(), k, v, 400, first_shifted_head=2)
    assert expected[:, 5:].isnan().all() and torch.equal(out.isnan(), expected.isnan())


def test_no_token_sees_the_future(module: ModuleType, config: Config) -> None:
    """Perturbing token j, by all that its dtype holds, changes no output before j: to the bit."""
    dtype = DTYPES[config.dtype]
    q, k, v = Problem(seqlen=200, heads=4, kv_heads=2, group_size=90, head_dim=config.head_dim, dtype=dtype).tensors()
    module.configure()
    before, _ = simt_kernels.forward(module, q, k, v, 90)
    for j in (0, 1, 44, 45, 63, 64, 89, 127, 128, 199):
        changed = [x.clone() for x in (q, k, v)]
        for x, amount in zip(changed, (3, 3, torch.finfo(dtype).max / 4), strict=True):
            x[:, j] += amount
        after, _ = simt_kernels.forward(module, *changed, 90)
        assert torch.equal(after[:, :j], before[:, :j]), f"token {j} changed an output before it"
        assert not torch.equal(after[:, j], before[:, j])
