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
    described = simt_kernels.problem(module(), q, q, 2 * half, None, first_shifted_head, None)
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
    described = simt_kernels.problem(module(), q, q, group * rows, None, heads, None)
    pairs_of_a_section = 20  # in half of an A100's L2
    turns = module().turns(described, rows, (20 << 20) // (group * rows * pairs_of_a_section))
    blocks = group * pairs_of_a_section
    for section in (turns[:blocks], turns[blocks : 2 * blocks]):
        assert len({turn[:2] for turn in section}) == pairs_of_a_section
        assert [tile for _, _, tile in section] == [t for t in (3, 2, 1, 0) for _ in range(pairs_of_a_section)]
    left = len(turns) - max(i for i, (_, _, tile) in enumerate(turns) if tile == group - 1)
    assert 8 * 128 * 3 / 4 < left < 8 * 128
