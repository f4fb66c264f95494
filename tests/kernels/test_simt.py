"""The emulator itself: a toy GEMM runs right on it, and each kind of mistake is found.

What the probes of simt_toy.cpp do is told by their names; their argument 1 does it right where 0 does it wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

import simt_build

THREADS = 64  # of a probe's block
SHARED_BYTES = 4096
SEEDS = range(8)


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    return simt_build.load(simt_build.build("simt_toy", [simt_build.ROOT / "tests" / "helpers" / "simt_toy.cpp"]))


def probe(toy: ModuleType, name: str, argument: int = 0, blocks: int = 1, seed: int = 0) -> torch.Tensor:
    out = torch.zeros(4096)
    toy.configure(seed)
    toy.probe(name, out.data_ptr(), argument, blocks)
    return out


def gemm(
    toy: ModuleType,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int, int] = (150, 128, 192),
    swizzled: bool = True,
    seed: int = 0,
    drop: str | None = None,
) -> bool:
    """Run it; whether the product and its row sums are right."""
    rows, columns, depth = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, depth, generator=generator).to(dtype)
    b = torch.randn(depth, columns, generator=generator).to(dtype)
    c = torch.full((rows, columns), float("nan"), dtype=dtype)
    row_sums = torch.zeros(rows)
    toy.configure(seed, drop)
    pointers = [tensor.data_ptr() for tensor in (a, b, c, row_sums)]
    toy.gemm(dtype == torch.bfloat16, swizzled, *pointers, *shape)
    expected = a.double() @ b.double()
    error = (c.double() - expected).abs().max()
    sums_error = (row_sums - expected.sum(1)).abs().max()
    return bool(error <= torch.finfo(dtype).eps * expected.abs().max() and sums_error < 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64, 64), (150, 128, 192), (1, 64, 320)])
def test_gemm(toy: ModuleType, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    for seed in SEEDS:
        assert gemm(toy, dtype, shape, seed=seed)
        assert gemm(toy, dtype, shape, swizzled=False, seed=seed)


@pytest.mark.parametrize("value", [1.0, -2.5, 65504.0, 6e-8, -3e-6, float("inf"), -float("inf"), float("nan")])
def test_gemm_of_special_values(toy: ModuleType, value: float) -> None:
    """Subnormal, largest and infinite elements, and NaN, come through the emulated mma as torch has them."""
    for dtype in (torch.bfloat16, torch.float16):
        a = torch.zeros(64, 64, dtype=dtype)
        a[0, 0] = value
        b = torch.eye(64, dtype=dtype)
        c, row_sums = torch.zeros_like(a), torch.zeros(64)
        toy.configure()
        pointers = [tensor.data_ptr() for tensor in (a, b, c, row_sums)]
        toy.gemm(dtype == torch.bfloat16, True, *pointers, 64, 64, 64)
        # 0 * inf is NaN in the rest of the row.
        torch.testing.assert_close(c, (a.double() @ b.double()).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_same_seed_same_bits(toy: ModuleType) -> None:
    def turns(seed: int) -> list[float]:
        return probe(toy, "take_turns", blocks=3, seed=seed).tolist()

    assert turns(5) == turns(5)
    orders = [tuple(turns(seed)) for seed in SEEDS]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order[1 : 1 + 2 * 3 * THREADS]) == sorted([*range(3 * THREADS)] * 2) for order in orders)


def test_counts(toy: ModuleType) -> None:
    """Per warp of the GEMM: the numbers of its tile, 64 x 64 by 4 warps, as the SASS has them."""
    assert gemm(toy, shape=(128, 128, 192))
    blocks, steps, warps = 4, 3, 4
    counters = toy.counters()
    assert counters["blocks"] == blocks and counters["warps"] == blocks * warps
    assert counters["mma"] == blocks * warps * steps * 32  # 16 x 64 results a warp, 8 columns and 16 of depth each
    assert counters["ldmatrix"] == blocks * warps * steps * (4 + 16)
    assert counters["cp_async"] == blocks * steps * 2 * 64 * 64 * 2 // 16 // 32
    assert counters["shared_stores"] == blocks * 64 * 64 * 2 // 4 // 32
    assert counters["shared_loads"] == blocks * 64 * 64 * 2 // 16 // 32
    assert counters["shuffle"] == blocks * warps * 4
    assert counters["barriers"] == blocks * (2 * steps + 1)


def test_conflicts(toy: ModuleType) -> None:
    """The swizzle is free of bank conflicts; without it eight rows of a matrix are in the same four banks."""
    kinds = ("ldmatrix_conflicts", "cp_async_conflicts", "load_conflicts", "store_conflicts")
    assert gemm(toy)
    assert all(toy.counters()[kind] == 0 for kind in kinds)
    assert gemm(toy, swizzled=False)
    counters = toy.counters()
    assert counters["ldmatrix_conflicts"] == 4 * 7 * counters["ldmatrix"]
    assert counters["store_conflicts"] == 7 * counters["shared_stores"]
    assert counters["cp_async_conflicts"] == counters["load_conflicts"] == 0


@pytest.mark.parametrize(
    "bytes_each, stride, conflicts",
    [
        (4, 0, 0), (4, 1, 0), (4, 2, 1), (4, 3, 0), (4, 8, 7), (4, 32, 31),
        (8, 0, 0), (8, 1, 0), (8, 2, 2), (8, 16, 2 * 15),
        (16, 0, 0), (16, 1, 0), (16, 2, 4), (16, 8, 4 * 7),
    ],
)  # fmt: skip
def test_conflicts_of_strided_loads(toy: ModuleType, bytes_each: int, stride: int, conflicts: int) -> None:
    """Extra passes of a warp; 4 bytes go all at once, 8 bytes by half and 16 by quarter warps."""
    probe(toy, f"load_strided_{bytes_each}", stride)
    counters = toy.counters()
    assert counters["shared_loads"] == THREADS // 32
    assert counters["load_conflicts"] == conflicts * THREADS // 32


def test_each_site_is_needed(toy: ModuleType) -> None:
    """Without any one barrier, commit or wait the GEMM is stopped or wrong, whatever the seed."""
    assert gemm(toy)
    sites = toy.sites()
    assert sorted(site.split()[1] for site in sites) == 2 * ["commit_copies"] + 3 * ["sync_block"] + ["wait_copies"]
    for site in sites:
        for seed in SEEDS:
            try:
                assert not gemm(toy, seed=seed, drop=site), f"right without {site}"
            except toy.Error as error:
                assert "race: " in str(error) or "in flight" in str(error)
            assert site in toy.sites()
    assert gemm(toy, drop="simt_toy.h:1 sync_block")  # there is none to drop


@pytest.mark.parametrize(
    "name, message",
    [
        ("read_neighbour", r"race: reads shared bytes \d+ to \d+, which thread \d+ wrote since the last barrier"),
        ("overwrite_read", r"race: writes shared bytes \d+ to \d+, which thread \d+ read since the last barrier"),
        ("read_in_flight", r"reads shared bytes \d+ to \d+, which a cp.async of thread \d+ still has in flight"),
        ("read_neighbours_copy", r"race: reads shared bytes \d+ to \d+, which thread \d+ wrote since the last barrier"),
    ],
)  # fmt: skip
def test_races(toy: ModuleType, name: str, message: str) -> None:
    for seed in SEEDS:
        probe(toy, name, 1, seed=seed)
        with pytest.raises(toy.Error, match=message):
            probe(toy, name, 0, seed=seed)


@pytest.mark.parametrize(
    "name, message",
    [
        ("write_same", "race: writes shared bytes 0 to 3, which thread .* wrote"),
        ("read_uncommitted", "in flight"),
        ("write_in_flight", "writes .* in flight"),
        ("misaligned", "misaligned access to shared memory: 8 bytes at 4"),
        ("half_a_warp", "the lanes of a warp part ways: thread .* is at shuffle, but thread .* has returned"),
    ],
)  # fmt: skip
def test_mistakes(toy: ModuleType, name: str, message: str) -> None:
    for seed in SEEDS:
        with pytest.raises(toy.Error, match=message):
            probe(toy, name, seed=seed)


def test_right_values(toy: ModuleType) -> None:
    index = torch.arange(THREADS)
    for seed in SEEDS:
        assert torch.equal(probe(toy, "read_neighbour", 1, seed=seed)[:THREADS], (index ^ 1).float())
        assert torch.equal(probe(toy, "read_in_flight", 1, seed=seed)[: 4 * THREADS : 4], torch.ones(THREADS))
        for mask in (1, 2, 16, 31):
            assert torch.equal(probe(toy, "shuffle", mask, seed=seed)[:THREADS], (index ^ mask).float())
        assert probe(toy, "add", blocks=5, seed=seed)[0] == 5 * THREADS


def test_new_shared_memory_is_nan(toy: ModuleType) -> None:
    probe(toy, "read_neighbour", 1)
    assert probe(toy, "read_unwritten")[:THREADS].isnan().all()


@pytest.mark.parametrize("name, width", [("load_at", 4), ("store_at", 4), ("copy_at", 16), ("ldmatrix_at", 16)])
def test_bounds(toy: ModuleType, name: str, width: int) -> None:
    rows = 32 if name == "ldmatrix_at" else 1
    first_outside = SHARED_BYTES // width - rows + 1
    if name in ("load_at", "ldmatrix_at"):  # the others would be writes of one place by many
        probe(toy, name, first_outside - 1)
    for argument in (-1, first_outside):
        with pytest.raises(toy.Error, match=f"out of bounds: {width} bytes at .* of {SHARED_BYTES} bytes"):
            probe(toy, name, argument)


@pytest.mark.parametrize("name", ["barriers_differ", "some_return"])
@pytest.mark.parametrize("alone", [1, 32])
def test_divergent_barrier(toy: ModuleType, name: str, alone: int) -> None:
    """Some threads of a warp, or whole warps, are at another barrier or have left."""
    probe(toy, name, 0)
    for seed in SEEDS:
        with pytest.raises(toy.Error, match=r"divergent barrier: thread \d+ .*simt_toy.cpp:\d+") as caught:
            probe(toy, name, alone, seed=seed)
        assert ("has returned" in str(caught.value)) == (name == "some_return")


def test_error_tells_where(toy: ModuleType) -> None:
    message = r"^thread \d+ of block \([01], 0, 0\), after simt_toy.cpp:\d+ sync_block: race: "
    with pytest.raises(toy.Error, match=message):
        probe(toy, "overwrite_read", blocks=2)
    assert issubclass(toy.Error, RuntimeError)


def test_pair_conversions(toy: ModuleType) -> None:
    """Rounding to nearest, ties to even, low half first."""
    for dtype, is_bfloat16 in ((torch.bfloat16, True), (torch.float16, False)):
        for low, high in ((1.0, -2.0), (1 + 2**-8, 1 + 3 * 2**-8), (1 + 2**-11, 1 + 3 * 2**-11), (1e-7, 1e30)):
            expected = torch.tensor([low, high]).to(dtype).tolist()
            assert list(toy.round_trip(is_bfloat16, low, high)) == expected


@pytest.fixture(scope="module")
def sanitized(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Run simt_sanitized.py under a sanitizer and return what was found, "" if nothing."""
    sanitizer: str = request.param
    module = simt_build.build("simt_toy", [simt_build.ROOT / "tests" / "helpers" / "simt_toy.cpp"], sanitizer)

    def run(name: str, argument: int = 0, blocks: int = 1) -> str:
        script = simt_build.ROOT / "tests" / "helpers" / "simt_sanitized.py"
        result = simt_build.run_sanitized(sanitizer, script, module, name, str(argument), str(blocks))
        return result.stderr if result.returncode else ""

    return run


@pytest.mark.full
@pytest.mark.parametrize("sanitized", ["address", "thread"], indirect=True)
def test_sanitizers_find_nothing(sanitized: Callable[..., str]) -> None:
    for seed in range(4):
        assert sanitized("gemm", seed) == ""
    assert sanitized("add", 0, 3) == ""
    assert sanitized("add_without_atomic", 0, 1) == ""
    assert "Error: " in sanitized("read_neighbour", 0, 1)  # the emulator's own errors still come through


@pytest.mark.full
@pytest.mark.parametrize("sanitized", ["thread"], indirect=True)
def test_thread_sanitizer(sanitized: Callable[..., str]) -> None:
    """Blocks that add up without atomics."""
    assert "WARNING: ThreadSanitizer: data race" in sanitized("add_without_atomic", 0, 3)


@pytest.mark.full
@pytest.mark.parametrize("sanitized", ["address"], indirect=True)
def test_address_sanitizer(sanitized: Callable[..., str]) -> None:
    """Global reads, writes and cp.async one element past the end of an array of 1024 floats."""
    assert sanitized("read_global_at", 1023) == sanitized("write_global_at", 1023) == ""
    assert sanitized("copy_global_at", 1024 - 4 * THREADS) == ""
    for name, argument in (("read_global_at", 1024), ("write_global_at", 1024), ("copy_global_at", 1028 - 4 * THREADS)):
        assert "AddressSanitizer: heap-buffer-overflow" in sanitized(name, argument)
