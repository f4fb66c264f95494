"""What the CUDA kernels take of a GPU: the table that benchmarks/resources.py wrote, and how it reads machine code."""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import resources
from sass import Instruction, Kernel, disassemble, find_cuobjdump

built = pytest.mark.skipif(not resources.built_units(), reason="not built with nvcc in this checkout")


def recorded() -> dict[str, Any]:
    return json.loads(resources.RESULTS.read_text())


def rows() -> list[dict[str, Any]]:
    """Of the kernels with matrix products."""
    return [row for row in recorded()["kernels"] if row["kernel"] in resources.EXPECTED]


def name(row: dict[str, Any]) -> str:
    return f"{row['kernel']} {row['dtype']} {row['head_dim']} {row['kib']}"


def test_every_instantiation_is_recorded() -> None:
    there = {(row["kernel"], row["dtype"], row["head_dim"], row["kib"]) for row in rows()}
    one_for_both = {("Forward", dtype, 64, 99) for dtype in ("bf16", "fp16")}
    assert there == set(product(resources.EXPECTED, ("bf16", "fp16"), (64, 128, 256), (163, 99))) - one_for_both
    with_products = {row["kernel"] for row in recorded()["kernels"] if row["instructions"]["HMMA"]}
    assert with_products == resources.EXPECTED.keys() == resources.TILES.keys()


def test_nothing_spills() -> None:
    for row in recorded()["kernels"]:
        assert row["stack"] == row["spill_stores"] == row["spill_loads"] == 0, name(row)
        assert row["instructions"]["LDL"] == row["instructions"]["STL"] == 0, name(row)


def test_loops_with_products_do_not_spill() -> None:
    for row in rows():
        assert row["in_product_loops"]["LDL"] == row["in_product_loops"]["STL"] == 0, name(row)
        assert row["in_product_loops"]["HMMA"] > 0, name(row)


def test_instructions_are_those_of_the_tile() -> None:
    """As many as the sizes ask for: none is missing, none is done twice."""
    for row in rows():
        expected = resources.EXPECTED[row["kernel"]](row["tile"], row["head_dim"])
        assert {kind: row["instructions"][kind] for kind in expected} == expected, name(row)


def test_kernels_fit_a_multiprocessor() -> None:
    for row in rows():
        assert row["blocks_per_multiprocessor"] >= 1, name(row)
        assert row["tile"]["dynamic_shared"] + row["static_shared"] <= row["kib"] * 1024, name(row)


def test_the_forward_for_all_gpus_has_two_blocks_on_the_smaller_ones() -> None:
    """Of four warps each: one alone would leave the tensor cores waiting."""
    for row in rows():
        if (row["kernel"], row["head_dim"]) == ("Forward", 64):
            tile = row["tile"]
            counted = (tile["threads"], row["registers"], tile["dynamic_shared"] + row["static_shared"], 99)
            assert resources.blocks_per_multiprocessor(*counted) == 2, name(row)


def skip_another_nvcc() -> None:
    if resources.nvcc_version() != recorded()["nvcc"]:
        pytest.skip(f"the record is of nvcc {recorded()['nvcc']}")


@built
@pytest.mark.skipif(not find_cuobjdump(), reason="no cuobjdump")
def test_record_is_of_this_build() -> None:
    skip_another_nvcc()
    assert resources.measure() == recorded()


def logs(architecture: str) -> dict[str, dict[str, dict[str, int]]]:
    """By unit. A build for the GPUs that CUDAARCHS named may have none."""
    skip_another_nvcc()
    return {unit: resources.ptxas_log(resources.build_log(unit), architecture) for unit in resources.built_units()}


@built
@pytest.mark.parametrize("architecture", ["sm_90", "sm_120"])
def test_code_for_newer_gpus_does_not_spill(architecture: str) -> None:
    """It is made of the same PTX."""
    for unit, log in logs(architecture).items():
        for kernel, row in log.items():
            assert row["stack"] == row["spill_stores"] == row["spill_loads"] == 0, f"{unit}: {kernel}"


@built
@pytest.mark.skipif(not find_cuobjdump(), reason="no cuobjdump")
def test_loops_for_an_h100_do_not_spill() -> None:
    for unit in filter(logs("sm_90").get, resources.built_units()):
        for kernel, code in disassemble(resources.OBJECTS / f"{unit}.cu.o", "sm_90").items():
            in_loops = code.count(code.product_loops)
            assert in_loops["LDL"] == in_loops["STL"] == 0, f"{unit}: {kernel}"


def kernel(*lines: str) -> Kernel:
    """Each line is an instruction, 16 bytes from the next."""
    instructions = []
    for number, line in enumerate(lines):
        predicate, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        instructions.append(Instruction(16 * number, bool(predicate), opcode, operands))
    return Kernel(instructions)


def test_innermost_loop_with_products() -> None:
    nested = kernel(
        "LDL R0, [R1]",  # 00 before
        "STL [R1], R0",  # 10 the outer loop begins
        "HMMA.16816.F32 R0, R4, R8, R0",  # 20 the inner loop begins
        "@P0 BRA 0x20",  # 30
        "@P1 BRA 0x60",  # 40 out of both
        "BRA 0x10",  # 50
        "EXIT",  # 60
        "BRA 0x70",  # 70 padding
    )
    assert sorted(map(sorted, nested.loops)) == [[1, 2, 3, 4], [2]]
    assert nested.count() == {"LDL": 1, "STL": 1, "HMMA": 1, "BRA": 4, "EXIT": 1}
    assert nested.count(nested.product_loops) == {"HMMA": 1, "BRA": 1}


def test_branch_back_is_no_loop_by_itself() -> None:
    """A rare case that lies behind the end and returns to the middle."""
    assert kernel("@P0 BRA 0x30", "HMMA R0", "EXIT", "STL [R1], R0", "BRA 0x10").loops == []
    both = kernel("BRA P0, 0x30", "HMMA R0", "@P1 BRA 0x0", "STL [R1], R0", "EXIT")
    assert both.count(both.product_loops) == {"BRA": 2, "HMMA": 1}


def test_ptxas_log() -> None:
    """Other architectures than sm_80 are left out."""
    log = """ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 100 registers, used 1 barriers, 584 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    24 bytes stack frame, 16 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem, 584 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gv' for 'sm_80'
ptxas info    : Function properties for _Z1gv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 6 registers, used 0 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 20.463 ms
"""
    assert resources.ptxas_log(log) == {
        "_Z1fv": {"registers": 255, "stack": 24, "spill_stores": 16, "spill_loads": 40, "static_shared": 512},
        "_Z1gv": {"registers": 6, "stack": 0, "spill_stores": 0, "spill_loads": 0, "static_shared": 0},
    }


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "kib", "blocks"),
    [
        (128, 255, 0, 163, 2),  # 256 registers a thread
        (128, 168, 0, 163, 3),
        (128, 169, 0, 163, 2),  # registers come in eights
        (32, 80, 0, 163, 24),  # six warps in each quarter, though the whole would hold 25
        (256, 32, 81 * 1024, 163, 2),  # 1 KiB a block is the system's
        (256, 32, 81 * 1024 + 1, 163, 1),
        (256, 32, 49 * 1024, 99, 2),
        (256, 32, 49 * 1024 + 1, 99, 1),
        (1024, 32, 0, 163, 2),
        (1024, 32, 0, 99, 1),
        (32, 16, 0, 163, 32),
        (32, 16, 0, 99, 16),
    ],
)
def test_blocks_per_multiprocessor(threads: int, registers: int, shared: int, kib: int, blocks: int) -> None:
    assert resources.blocks_per_multiprocessor(threads, registers, shared, kib) == blocks
