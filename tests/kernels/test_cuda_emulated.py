"""The CUDA kernels, run on a CPU by the emulator of csrc/simt: every feature right against the definition, no race, no
bank conflict, no access out of bounds, no product more than needed.

Here the kernels of two dtypes, head dims and classes of GPU stand for all; `--full` compiles and runs every one.
"""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import resources
import simt_build
import simt_kernels
from longlora_ext.reference import s2attn_mask, s2attn_reference
from op_checks import (
    Problem,
    assert_close_to_reference,
    assert_outputs_and_grads_close,
    assert_same,
    outputs_and_grads,
)


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All kernels are compared with the definition and counted. All else is asked of one dtype: they are slow here."""
    every = metafunc.function is test_shapes
    metafunc.parametrize("config", [config for config in CONFIGS if every or config.id in ONE_DTYPE])


@pytest.fixture
def module(request: pytest.FixtureRequest, config: Config) -> Iterator[ModuleType]:
    """All kernels that the selected tests are about, and no others: compiling one takes half a minute.

    They run on a GPU that offers a block as much shared memory as they are made for.
    """
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    configs = sorted({chosen["config"] for chosen in parameters if isinstance(chosen.get("config"), Config)})
    module = simt_kernels.kernels(*simt_build.kernels_for(configs))
    module.pretend(shared_memory_bytes=config.kib * 1024)
    yield module
    module.configure()  # whoever comes next finds nothing left out
    module.pretend()


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
    assert [module.counters()[kind] for kind in CONFLICTS] == [0, 0, 0, 0]


SHAPES: dict[str, dict[str, Any]] = {
    "a token": {"seqlen": 1, "heads": 2, "kv_heads": 1, "group_size": 2},
    "groups of two": {"seqlen": 150, "heads": 2, "kv_heads": 2, "group_size": 2},
    "group beyond the end": {"seqlen": 130, "heads": 2, "kv_heads": 1, "group_size": 1000},
    "whole tiles": {"seqlen": 512, "heads": 2, "kv_heads": 2, "group_size": 256},
    "many tiles, ragged": {"seqlen": 1000, "heads": 2, "kv_heads": 1, "group_size": 800},
    "dense": {"seqlen": 400, "heads": 2, "kv_heads": 2, "group_size": 2**40, "first_shifted_head": 2},
    "all shifted": {"seqlen": 300, "heads": 2, "kv_heads": 2, "group_size": 200, "first_shifted_head": 0, "scale": 0.7},
    "no scores": {"seqlen": 150, "heads": 2, "kv_heads": 2, "group_size": 100, "scale": 0.0},
    "GQA, mixed": {"seqlen": 270, "heads": 6, "kv_heads": 2, "group_size": 100, "first_shifted_head": 1},
    "a row past a group": {"seqlen": 301, "heads": 2, "kv_heads": 1, "group_size": 100},
    "MQA, batch": {"batch": 2, "seqlen": 200, "heads": 4, "kv_heads": 1, "group_size": 150},
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(module: ModuleType, config: Config, shape: str, deterministic: bool) -> None:
    problem = Problem(**SHAPES[shape], head_dim=config.head_dim, dtype=DTYPES[config.dtype])
    check(module, problem, deterministic=deterministic, seed=list(SHAPES).index(shape))


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


@pytest.mark.full
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES)
def test_seeds(module: ModuleType, config: Config, shape: str, seed: int, deterministic: bool) -> None:
    """The order of blocks, warps and lanes changes nothing. The two dtypes share the seeds."""
    problem = Problem(**SHAPES[shape], documents=True, head_dim=config.head_dim, dtype=DTYPES[config.dtype])
    check(module, problem, problem.doc_start(), deterministic, 100 + 2 * list(DTYPES).index(config.dtype) + seed)


@pytest.mark.parametrize("columns", [8, 24, 56])
def test_head_dims_between(module: ModuleType, config: Config, columns: int) -> None:
    """They go into the next that there is a kernel for."""
    head_dim = config.head_dim // 2 * (config.head_dim > 64) + columns
    shape = {"seqlen": 200, "heads": 2, "kv_heads": 1, "group_size": 150}
    for deterministic in (False, True):
        check(module, Problem(**shape, head_dim=head_dim, dtype=DTYPES[config.dtype]), deterministic=deterministic)


def starts_of(lengths: Sequence[int]) -> Tensor:
    begins = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    return begins.repeat_interleave(torch.tensor(lengths)).to(torch.int32)


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


@pytest.mark.parametrize("sink", [False, True], ids=["dense", "sink"])
def test_deterministic_gives_the_same_bits(module: ModuleType, config: Config, sink: bool) -> None:
    """In whatever order the blocks run. Where dq is summed up by atomics, it alone differs, in its last bits."""
    problem = Problem(seqlen=TOKENS[config.head_dim], heads=2, kv_heads=1, head_dim=config.head_dim)
    q, k, v = (x.to(DTYPES[config.dtype]) for x in problem.tensors())
    k += 100  # which cancels out in dq, but for the rounding of its sums: that reaches the bits left by the dtype
    dout = torch.randn_like(q)

    def results(deterministic: bool, seed: int) -> tuple[Tensor, ...]:
        module.configure(seed)
        group_size = problem.seqlen * 3 // 4 if sink else problem.seqlen
        run = Run(module, group_size, None, {"first_shifted_head": 2, "sink": sink}, deterministic)
        return outputs_and_grads(run, q, k, v, dout)

    out, dq, dk, dv = results(True, 0)
    for seed in range(1, 4):
        assert all(torch.equal(a, b) for a, b in zip(results(True, seed), (out, dq, dk, dv), strict=True))
    by_atomics = [results(False, seed) for seed in range(4)]
    for result in by_atomics:
        assert_same(result[1], dq)
        assert all(torch.equal(result[i], exact) for i, exact in ((0, out), (2, dk), (3, dv)))
    assert any(not torch.equal(result[1], by_atomics[0][1]) for result in by_atomics)


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
    # A doc_start that is none makes wrong results, and no more.
    starts = (None, problem.doc_start(), garbage, backwards)
    for doc_start, deterministic, sink in product(starts, (False, True), (False, True)):
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


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Config], dict[str, int]]:
    """The tile of a direction, from tile_config.h itself."""
    fields = {"forward": ["rows", "keys", "warps"]}
    fields["backward"] = [*fields["forward"], "score_warps", "dkv_warps", "dq_warps"]
    program = tmp_path_factory.mktemp("tiles") / "tiles.cpp"
    prints = "".join(
        f'std::printf("%d ", longlora::cuda::{direction}_tile(head_dim, kib).{name});'
        for direction, names in fields.items()
        for name in names
    )
    program.write_text(
        f'#include <cstdio>\n#include <cstdlib>\n#include "{simt_build.CUDA}/tile_config.h"\n'
        "int main(int, char** arguments) {\n"
        f"const int head_dim = std::atoi(arguments[1]), kib = std::atoi(arguments[2]); {prints} }}\n"
    )
    binary = program.with_suffix("")
    simt_build.run([*simt_build.CXX, "-std=c++17", program, "-o", binary])

    def tile(direction: str, config: Config) -> dict[str, int]:
        command = [binary, str(config.head_dim), str(config.kib)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        names = [(way, name) for way, of_way in fields.items() for name in of_way]
        values = {name: int(value) for (way, name), value in zip(names, printed, strict=True) if way == direction}
        return values | {"threads": 32 * values["warps"]}

    return tile


def visible_tiles(problem: Problem, doc_start: Tensor | None, rows: int, keys: int) -> int:
    """Tiles of scores, of all heads, in which some row sees some key other than its sink."""
    total = 0
    for head in range(problem.heads):
        shifted = head >= problem.heads // 2
        pattern: dict[str, Any] = {"window": problem.window, "seqlen_k": problem.tokens}
        mask = s2attn_mask(problem.seqlen, problem.group_size, shifted, doc_start, **pattern)  # without the sink
        mask = mask.expand(problem.batch, problem.seqlen, problem.tokens).float()
        total += int(torch.nn.functional.max_pool2d(mask, (rows, keys), ceil_mode=True).sum())
    return total


def seen_tiles(problem: Problem, doc_start: Tensor | None, keys: int) -> int:
    """Tiles of keys, of the one KV head, of which some row of some head sees a key."""
    masks = [
        s2attn_mask(problem.seqlen, problem.group_size, shifted, doc_start, seqlen_k=problem.tokens)
        for shifted in (False, True)
    ]
    seen = (masks[0] | masks[1]).any(dim=-2).expand(problem.batch, problem.tokens).float()
    return int(torch.nn.functional.max_pool1d(seen, keys, ceil_mode=True).sum())


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize(
    "pattern",
    [{}, {"sink": True, "window": 129}, {"sink": True, "seqlen_k": 777}, {"seqlen_k": 650}],
    ids=["groups", "window", "last", "last, whose unshifted groups begin first"],
)
def test_no_instruction_more_than_needed(
    module: ModuleType,
    config: Config,
    tiles: Callable[[str, Config], dict[str, int]],
    documents: bool,
    pattern: dict[str, Any],
) -> None:
    """Products, matrix loads and copies are those of the tiles that hold something, counted as for the machine code.

    The sink adds to none of them.
    """
    shape = {"batch": 2, "seqlen": 450, "heads": 2, "kv_heads": 1, "group_size": 300, **pattern}
    problem = Problem(**shape, documents=documents, head_dim=config.head_dim, dtype=DTYPES[config.dtype])
    options: dict[str, Any] = {"sink": problem.sink, "window": problem.window}
    q, k, v = problem.tensors()
    doc_start = problem.doc_start()
    head_dim = config.head_dim

    def counted() -> Counter[str]:
        counters = module.counters()
        return Counter(HMMA=counters["mma"], LDSM=counters["ldmatrix"], LDGSTS=counters["cp_async"])

    def times(n: int, counts: Counter[str]) -> Counter[str]:
        return Counter({kind: n * count for kind, count in counts.items()})

    def tiles_of(length: int) -> int:
        return -(-problem.seqlen // length) * problem.batch

    tile = tiles("forward", config)
    rows, keys, warps, threads = tile["rows"], tile["keys"], tile["warps"], tile["threads"]
    step = resources.product(rows, keys, head_dim, warps, warps)
    step += resources.product(rows, head_dim, keys, warps, warps, a_in_registers=True)
    step += resources.load(2 * keys, head_dim, threads)
    expected = times(visible_tiles(problem, doc_start, rows, keys), step)
    expected += times(tiles_of(rows) * problem.heads, resources.load(rows, head_dim, threads))
    module.configure()
    out, lse = simt_kernels.forward(module, q, k, v, problem.group_size, doc_start, **options)
    assert counted() == times(warps, expected)

    tile = tiles("backward", config)
    rows, keys, warps, threads = tile["rows"], tile["keys"], tile["warps"], tile["threads"]
    scores = times(2, resources.product(rows, keys, head_dim, warps, tile["score_warps"]))
    dkv = times(2, resources.product(keys, head_dim, rows, warps, tile["dkv_warps"]))
    dq = resources.product(rows, head_dim, keys, warps, tile["dq_warps"])
    load_rows, load_keys = resources.load(2 * rows, head_dim, threads), resources.load(2 * keys, head_dim, threads)
    steps = visible_tiles(problem, doc_start, rows, keys)
    by_keys = times(steps, scores + dkv + load_rows) + times(seen_tiles(problem, doc_start, keys), load_keys)
    by_rows = times(steps, scores + dq + load_keys) + times(tiles_of(rows) * problem.heads, load_rows)
    statistics = Counter(LDGSTS=2 * rows // 32)  # lse and delta of a tile of rows, by as many warps as it takes
    by_keys, by_rows = times(warps, by_keys), times(warps, by_rows)
    by_keys += times(steps, statistics)
    by_rows += times(tiles_of(rows) * problem.heads, statistics)
    for deterministic, expected in ((False, by_keys + times(warps * steps, dq)), (True, by_keys + by_rows)):
        module.configure()
        options["deterministic"] = deterministic
        simt_kernels.backward(module, out, q, k, v, out, lse, problem.group_size, doc_start, **options)
        assert counted() == expected


def test_each_site_is_needed(module: ModuleType, config: Config) -> None:
    """Without any one barrier, commit or wait the kernels are stopped or wrong, for one of a few seeds at least."""
    problem = Problem(seqlen=TOKENS[config.head_dim], heads=2, kv_heads=1, head_dim=config.head_dim)
    q, k, v = (x.to(DTYPES[config.dtype]) for x in problem.tensors())
    # A tile has 32 keys in one backward, and more in all others.
    first, group_size = (15, 20) if (config.head_dim, config.kib) == (256, 99) else (55, 100)
    dout, packed = torch.randn_like(q), starts_of([first, problem.seqlen - first])[None]

    def results(deterministic: bool) -> tuple[Tensor, ...]:
        """Of dense attention, of groups with two sinks in a tile of keys, and of rows whose keys are one tile."""
        dense = Run(module, problem.seqlen, None, {}, deterministic)
        sinks = Run(module, group_size, packed, {"sink": True}, deterministic)
        of_all = (outputs_and_grads(run, q, k, v, dout) for run in (dense, sinks))
        return sum(of_all, outputs_and_grads(dense, *(x[:, :9].contiguous() for x in (q, k, v, dout))))

    module.configure()
    right = {deterministic: results(deterministic) for deterministic in (False, True)}
    sites = module.sites()
    assert {site.split()[1] for site in sites} == {"sync_block", "commit_copies", "wait_copies"}

    def survives(site: str, seed: int) -> bool:
        module.configure(seed, site)
        try:
            for deterministic, expected in right.items():
                for a, b in zip(results(deterministic), expected, strict=True):
                    assert_same(a, b)
        except (RuntimeError, AssertionError):  # simt's Error, or wrong
            return False
        return True

    assert [site for site in sorted(sites) if all(survives(site, seed) for seed in range(4))] == []
