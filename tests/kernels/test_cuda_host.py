"""The host's side of the CUDA kernels, as far as it shows without a GPU: the formula they share with all others, and
what an unfit device is told."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import simt_build
import simt_kernels
from emulated import DTYPES, FAST, Config
from longlora_ext.reference import s2attn_mask


@given(
    seqlen=st.integers(1, 60),
    before=st.integers(0, 30),
    half=st.integers(1, 40),
    shifted=st.booleans(),
    window=st.integers(1, 90),
    cuts=st.sets(st.integers(-29, 59)),
)
def test_the_formula_is_the_definition(
    kernels: ModuleType, seqlen: int, before: int, half: int, shifted: bool, window: int, cuts: set[int]
) -> None:
    """groups.h, which the CPU and the CUDA kernels are compiled with, says where a row's keys begin.

    The queries are the last of the keys, of which `before` come earlier; documents may begin earlier still.
    """
    tokens = range(before, before + seqlen)
    starts = [max((before + cut for cut in cuts if before + cut <= i), default=-7) for i in tokens]
    doc_start, pattern = torch.tensor(starts), {"window": window, "seqlen_k": before + seqlen}
    mask = s2attn_mask(seqlen, 2 * half, shifted, doc_start, **pattern)
    first = [kernels.first_key(i, d, 2 * half, shifted, window) for i, d in zip(tokens, starts, strict=True)]
    assert first == mask.int().argmax(dim=-1).tolist()
    with_sink = s2attn_mask(seqlen, 2 * half, shifted, doc_start, sink=True, **pattern)
    sinks = [kernels.sees_sink(*both) for both in zip(first, starts, strict=True)]
    assert sinks == (with_sink & ~mask).any(dim=-1).tolist()
    for key, d in zip(tokens, starts, strict=True):  # in whose document and group the rows that see it end
        end = next((i for i, start in zip(tokens, starts, strict=True) if start > key), before + seqlen)
        end = min(end, kernels.last_row_end(key, d, 2 * half, shifted, window))
        assert end == before + 1 + int(mask[:, key].nonzero().max())


def test_an_old_gpu_is_told_what_to_use_instead(kernels: ModuleType) -> None:
    q = torch.randn(1, 64, 2, 64, dtype=torch.bfloat16)
    kernels.pretend(7)
    try:
        with pytest.raises(RuntimeError, match=r"7\.0, .* need 8\.0 .*attn_implementation='sdpa'"):
            simt_kernels.forward(kernels, q, q, q, 16)
    finally:
        kernels.pretend()
    assert simt_kernels.forward(kernels, q, q, q, 16)[0].isfinite().all()


A100, RTX_3090 = 163 * 1024, 99 * 1024  # bytes of shared memory that it offers a block
L2_OF_RTX_3090 = 6 << 20

# KiB that a block takes, of the tiles for an A100 and for GPUs of 99 KiB.
FORWARD = {64: (48.5, 48.5), 128: (80.5, 80.5), 256: (160.5, 96.5)}
BACKWARD = {64: (162.5, 97.25), 128: (161.25, 96.375), 256: (144.75, 68.375)}


@pytest.fixture
def pretend(kernels: ModuleType) -> Iterator[Callable[..., None]]:
    """What the host code finds, until the test ends."""
    kernels.configure()
    yield kernels.pretend
    kernels.pretend()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_both_classes_of_gpus_run_every_head_dim_in_both_directions(
    head_dim: int, backward: bool, kernels: ModuleType, pretend: Callable[..., None]
) -> None:
    for shared_memory_bytes in (A100, RTX_3090, 228 * 1024):
        pretend(shared_memory_bytes=shared_memory_bytes)
        for narrower in (head_dim, head_dim - 8):  # goes into the same kernel
            assert kernels.why_unsupported(-1, narrower, backward) == ""


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_gpu_with_too_little_shared_memory_is_told_so_before_anything_runs(
    head_dim: int, backward: bool, kernels: ModuleType, pretend: Callable[..., None]
) -> None:
    """There is none of compute capability 8.0 so far: the smaller tiles' limits are what this shows."""
    direction, needed = (
        "backward" if backward else "forward",
        int((BACKWARD if backward else FORWARD)[head_dim][1] * 1024),
    )
    pretend(shared_memory_bytes=needed)
    assert kernels.why_unsupported(-1, head_dim, backward) == ""
    pretend(shared_memory_bytes=needed - 1)
    assert kernels.why_unsupported(3, head_dim, backward) == (
        f"the {direction} at head_dim {head_dim} needs {needed} bytes of shared memory, but GPU 3 offers "
        f"{needed - 1} to a block; use attn_implementation='sdpa'"
    )


def test_the_kernels_throw_what_is_answered_beforehand(kernels: ModuleType, pretend: Callable[..., None]) -> None:
    q = torch.randn(1, 64, 2, 64, dtype=torch.bfloat16)
    out, lse = simt_kernels.forward(kernels, q, q, q, 16)
    pretend(shared_memory_bytes=64 * 1024)
    assert torch.equal(simt_kernels.forward(kernels, q, q, q, 16)[0], out)  # the forward fits
    kernels.configure()
    with pytest.raises(RuntimeError) as caught:
        simt_kernels.backward(kernels, q, q, q, q, out, lse, 16)
    assert str(caught.value) == "s2attn: " + kernels.why_unsupported(-1, 64, True)
    assert kernels.counters()["blocks"] == 0


def test_a_gpu_takes_the_tiles_that_are_made_for_it(
    configs: frozenset[Config], kernels: ModuleType, pretend: Callable[..., None]
) -> None:
    """Those for 163 KiB where they fit, and otherwise those for 99: it shows by those that are not in this module."""
    sizes = {(config.head_dim, config.kib) for config in configs}
    for dtype, head_dim, _ in FAST:
        q = torch.randn(1, 64, 2, head_dim, dtype=DTYPES[dtype])
        for shared_memory_bytes, kib in ((A100, 163), (A100 - 1, 99), (RTX_3090, 99), (228 * 1024, 163)):
            out, lse = torch.zeros_like(q), torch.full((1, 2, 64), 50.0)
            pretend(shared_memory_bytes=shared_memory_bytes)
            if (head_dim, kib) in sizes:
                assert simt_kernels.backward(kernels, q, q, q, q, out, lse, 16)[0].isfinite().all()
            else:
                with pytest.raises(RuntimeError, match="not among the kernels of this build"):
                    simt_kernels.backward(kernels, q, q, q, q, out, lse, 16)


@pytest.mark.parametrize(("head_dim", "rows"), [(64, (128, 64)), (128, (64, 32)), (256, (64, 32))])
def test_scratch_is_that_of_the_tiles(
    head_dim: int, rows: tuple[int, int], kernels: ModuleType, pretend: Callable[..., None]
) -> None:
    q = torch.empty(2, 130, 4, head_dim)
    described = simt_kernels.problem(kernels, q, q, 16, None, None, None, True, None)
    for shared_memory_bytes, rows_of_tile in zip((A100, RTX_3090), rows, strict=True):
        pretend(shared_memory_bytes=shared_memory_bytes)
        tiles = 2 * 4 * -(-130 // rows_of_tile)
        assert kernels.dq_scratch_floats(described, False) == tiles * rows_of_tile * head_dim
        assert kernels.dq_scratch_floats(described, True) == 0
        assert kernels.sink_sums_floats(described) == tiles * 2 * head_dim


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("tile.warps = 4, tile.stages", "tile.warps = 4, tile.stages", ""),
        ("tile.warps = 4, tile.stages", "tile.warps = 2, tile.stages", "a thread adds up one four of the parts"),
        ("tile.keys = 128, tile.stages = 2", "tile.keys = 512, tile.stages = 2", "one four of the parts, and one key"),
        ("tile.rows = large ? 64 : 32", "tile.rows = 64", "a tile fits what its class of GPU offers"),
    ],
    ids=["right", "warps", "keys", "rows"],
)
def test_a_tile_that_cannot_be_does_not_compile(right: str, wrong: str, says: str, tmp_path: Path) -> None:
    csrc = shutil.copytree(simt_build.ROOT / "csrc", tmp_path / "csrc")
    tiles = csrc / "cuda" / "tile_config.h"
    assert tiles.read_text().count(right) == 1
    tiles.write_text(tiles.read_text().replace(right, wrong))
    flags = [*simt_build.COMMON_FLAGS, *simt_build.include_flags(), "-x", "c++", "-fsyntax-only"]
    command = [*simt_build.CXX, *flags, str(csrc / "cuda" / "dispatch.cu")]
    errors = subprocess.run(command, capture_output=True, text=True).stderr
    assert (says in errors and "static assertion failed" in errors) if says else not errors


def test_a_grid_has_a_largest_size(kernels: ModuleType) -> None:
    """Sequences of one token, of which a block each is a tile: no fewer bytes could ask for so many."""
    for batch, heads in ((2**16, 2**15 - 1), (2**16, 2**15)):
        q = torch.empty(8).expand(batch, 1, heads, 8)
        described = simt_kernels.problem(kernels, q, q, 2, None, heads, None, False, None)
        if batch * heads < 2**31:
            assert kernels.blocks(described, 64) == batch * heads
        else:
            with pytest.raises(RuntimeError, match=r"s2attn: batch \* heads .* 2147483648 blocks.* 2147483647$"):
                kernels.blocks(described, 64)


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
def test_errors_of_the_runtime_say_what_to_do(kernels: ModuleType, error: int, advice: str) -> None:
    q = torch.randn(1, 64, 2, 64, dtype=torch.bfloat16)
    kernels.pretend(error=error)
    try:
        with pytest.raises(RuntimeError, match=f"^s2attn: asking for the current GPU: CUDA's own words{advice}"):
            simt_kernels.forward(kernels, q, q, q, 16)
    finally:
        kernels.pretend()


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
    kernels: ModuleType, seqlen: int, half: int, batch: int, heads: int, first_shifted_head: int, bytes_per_row: int
) -> None:
    """And where no head is shifted, no block is idle but for a ragged last group."""
    rows, first_shifted_head = 64, min(first_shifted_head, heads)
    q = torch.empty(batch, seqlen, heads, 8)
    described = simt_kernels.problem(kernels, q, q, 2 * half, None, first_shifted_head, None, False, None)
    turns = kernels.turns(described, rows, bytes_per_row)
    tiles = -(-seqlen // rows)
    assert sorted(turn for turn in turns if turn[2] >= 0) == list(product(range(batch), range(heads), range(tiles)))
    if first_shifted_head == heads:
        group = min(tiles, -(-min(2 * half, 2 * seqlen) // rows))
        assert len(turns) == batch * heads * -(-tiles // group) * group


@pytest.mark.parametrize(
    ("l2_bytes", "pairs_of_a_section"), [(40 << 20, 20), (L2_OF_RTX_3090, 3), (1 << 20, 1), (60 << 20, 20)]
)
def test_blocks_go_by_section_then_from_the_longest(
    l2_bytes: int, pairs_of_a_section: int, kernels: ModuleType, pretend: Callable[..., None]
) -> None:
    """Neighbours share what fits into L2, of which no more than an A100's counts; but at the end, long blocks are not
    left to a few multiprocessors."""
    batch, heads, group, rows = 100, 16, 4, 64
    q = torch.empty(batch, group * rows, heads, 8)
    described = simt_kernels.problem(kernels, q, q, group * rows, None, heads, None, False, None)
    bytes_per_row = (20 << 20) // (group * rows * 20)  # so that 20 pairs fit into half of an A100's L2
    pretend(l2_bytes=l2_bytes)
    turns = kernels.turns(described, rows, bytes_per_row)
    blocks = group * pairs_of_a_section
    for section in (turns[:blocks], turns[blocks : 2 * blocks]):
        assert len({turn[:2] for turn in section}) == pairs_of_a_section
        assert [tile for _, _, tile in section] == [t for t in (3, 2, 1, 0) for _ in range(pairs_of_a_section)]
    left = len(turns) - max(i for i, (_, _, tile) in enumerate(turns) if tile == group - 1)
    assert 8 * 128 * 3 / 4 < left < 8 * 128
