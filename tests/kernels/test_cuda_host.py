"""The host's side of the CUDA kernels, as far as it shows without a GPU: the formula they share with all others, and
what an unfit device is told."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import simt_kernels
from longlora_ext.reference import s2attn_mask
from simt_build import Kernel


def module():
    # Those of the fast tests of the kernels: a process has one such module.
    configs = (("bf16", 64), ("fp16", 128))
    return simt_kernels.kernels(*(Kernel(way, *config) for way in ("backward", "forward") for config in configs))


@settings(deadline=None)  # the first example builds the module
@given(
    seqlen=st.integers(1, 60),
    before=st.integers(0, 30),
    half=st.integers(1, 40),
    shifted=st.booleans(),
    window=st.integers(1, 90),
    cuts=st.sets(st.integers(-29, 59)),
)
def test_the_formula_is_the_definition(
    seqlen: int, before: int, half: int, shifted: bool, window: int, cuts: set[int]
) -> None:
    """groups.h, which the CPU and the CUDA kernels are compiled with, says where a row's keys begin.

    The queries are the last of the keys, of which `before` come earlier; documents may begin earlier still.
    """
    tokens = range(before, before + seqlen)
    starts = [max((before + cut for cut in cuts if before + cut <= i), default=-7) for i in tokens]
    doc_start, pattern = torch.tensor(starts), {"window": window, "seqlen_k": before + seqlen}
    mask = s2attn_mask(seqlen, 2 * half, shifted, doc_start, **pattern)
    first = [module().first_key(i, d, 2 * half, shifted, window) for i, d in zip(tokens, starts, strict=True)]
    assert first == mask.int().argmax(dim=-1).tolist()
    with_sink = s2attn_mask(seqlen, 2 * half, shifted, doc_start, sink=True, **pattern)
    sinks = [module().sees_sink(*both) for both in zip(first, starts, strict=True)]
    assert sinks == (with_sink & ~mask).any(dim=-1).tolist()
    for key, d in zip(tokens, starts, strict=True):  # in whose document and group the rows that see it end
        end = next((i for i, start in zip(tokens, starts, strict=True) if start > key), before + seqlen)
        end = min(end, module().last_row_end(key, d, 2 * half, shifted, window))
        assert end == before + 1 + int(mask[:, key].nonzero().max())


def test_an_old_gpu_is_told_what_to_use_instead() -> None:
    q = torch.randn(1, 64, 2, 64, dtype=torch.bfloat16)
    module().pretend(7)
    try:
        with pytest.raises(RuntimeError, match=r"7\.0, .* need 8\.0 .*attn_implementation='sdpa'"):
            simt_kernels.forward(module(), q, q, q, 16)
    finally:
        module().pretend()
    assert simt_kernels.forward(module(), q, q, q, 16)[0].isfinite().all()


# KiB that a block takes; what a GPU offers one: 163 or more an A100 and newer, 99 an RTX 3090, 4090 or 5090.
@pytest.mark.parametrize(
    ("head_dim", "forward", "backward"), [(64, 48.5, 162.0), (128, 64.5, 161.0), (256, 128.5, 144.5)]
)
def test_a_gpu_with_too_little_shared_memory_is_told_so_before_anything_runs(
    head_dim: int, forward: float, backward: float
) -> None:
    try:
        for is_backward, kib in ((False, forward), (True, backward)):
            direction, needed = "backward" if is_backward else "forward", int(kib * 1024)
            module().pretend(shared_memory_bytes=needed)
            assert module().why_unsupported(-1, head_dim, is_backward) == ""
            module().pretend(shared_memory_bytes=needed - 1)
            assert module().why_unsupported(3, head_dim, is_backward) == (
                f"the {direction} at head_dim {head_dim} needs {needed} bytes of shared memory, but GPU 3 offers "
                f"{needed - 1} to a block; use attn_implementation='sdpa'"
            )
            assert module().why_unsupported(0, head_dim - 8, is_backward)  # goes into the same kernel
    finally:
        module().pretend()


def test_the_kernels_throw_what_is_answered_beforehand() -> None:
    q = torch.randn(1, 64, 2, 64, dtype=torch.bfloat16)
    out, lse = simt_kernels.forward(module(), q, q, q, 16)
    module().pretend(shared_memory_bytes=99 * 1024)
    try:
        assert torch.equal(simt_kernels.forward(module(), q, q, q, 16)[0], out)  # the forward fits
        module().configure()
        with pytest.raises(RuntimeError) as caught:
            simt_kernels.backward(module(), q, q, q, q, out, lse, 16)
        assert str(caught.value) == "s2attn: " + module().why_unsupported(-1, 64, True)
        assert module().counters()["blocks"] == 0
    finally:
        module().pretend()


def test_a_grid_has_a_largest_size() -> None:
    """Sequences of one token, of which a block each is a tile: no fewer bytes could ask for so many."""
    for batch, heads in ((2**16, 2**15 - 1), (2**16, 2**15)):
        q = torch.empty(8).expand(batch, 1, heads, 8)
        described = simt_kernels.problem(module(), q, q, 2, None, heads, None, False, None)
        if batch * heads < 2**31:
            assert module().blocks(described, 64) == batch * heads
        else:
            with pytest.raises(RuntimeError, match=r"s2attn: batch \* heads .* 2147483648 blocks.* 2147483647$"):
                module().blocks(described, 64)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (2, "$"),  # out of memory: CUDA says all that there is to say
        (35, r" \(longlora_ext was built with CUDA \d+\.\d+, the driver is of CUDA 12\.4\): update the driver, or "),
        (222, r" .* built with CUDA .*: update the driver, or build .* nvcc .*CUDACXX, .*attn_implementation='sdpa'$"),
        (209, r": this build of longlora_ext has no code for this GPU; build .*CUDAARCHS .*'sdpa'$"),
    ],
    ids=["memory", "old driver", "PTX of a newer nvcc", "no code"],
)
def test_errors_of_the_runtime_say_what_to_do(error: int, advice: str) -> None:
    q = torch.randn(1, 64, 2, 64, dtype=torch.bfloat16)
    module().pretend(error=error)
    try:
        with pytest.raises(RuntimeError, match=f"^s2attn: asking for the current GPU: CUDA's own words{advice}"):
            simt_kernels.forward(module(), q, q, q, 16)
    finally:
        module().pretend()


@settings(deadline=None)
@given(
    seqlen=st.integers(1, 600),
    half=st.integers(1, 400),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    first_shifted_head=st.integers(0, 4),
    bytes_per_row=st.sampled_from([1, 3 << 15, 1 << 20]),
)
@example(seqlen=600, half=128, batch=50, heads=16, first_shifted_head=8, bytes_per_row=1 << 15)  # in sections
def test_each_tile_has_one_block(
    seqlen: int, half: int, batch: int, heads: int, first_shifted_head: int, bytes_per_row: int
) -> None:
    """And where no head is shifted, no block is idle but for a ragged last group."""
    rows, first_shifted_head = 64, min(first_shifted_head, heads)
    q = torch.empty(batch, seqlen, heads, 8)
    described = simt_kernels.problem(module(), q, q, 2 * half, None, first_shifted_head, None, False, None)
    turns = module().turns(described, rows, bytes_per_row)
    tiles = -(-seqlen // rows)
    assert sorted(turn for turn in turns if turn[2] >= 0) == list(product(range(batch), range(heads), range(tiles)))
    if first_shifted_head == heads:
        group = min(tiles, -(-min(2 * half, 2 * seqlen) // rows))
        assert len(turns) == batch * heads * -(-tiles // group) * group


def test_blocks_go_by_section_then_from_the_longest() -> None:
    """Neighbours share what fits into L2; but at the end, long blocks are not left to a few multiprocessors."""
    batch, heads, group, rows = 100, 16, 4, 64
    q = torch.empty(batch, group * rows, heads, 8)
    described = simt_kernels.problem(module(), q, q, group * rows, None, heads, None, False, None)
    pairs_of_a_section = 20  # in half of an A100's L2
    turns = module().turns(described, rows, (20 << 20) // (group * rows * pairs_of_a_section))
    blocks = group * pairs_of_a_section
    for section in (turns[:blocks], turns[blocks : 2 * blocks]):
        assert len({turn[:2] for turn in section}) == pairs_of_a_section
        assert [tile for _, _, tile in section] == [t for t in (3, 2, 1, 0) for _ in range(pairs_of_a_section)]
    left = len(turns) - max(i for i, (_, _, tile) in enumerate(turns) if tile == group - 1)
    assert 8 * 128 * 3 / 4 < left < 8 * 128
