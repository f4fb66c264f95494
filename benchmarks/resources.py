"""What each CUDA kernel takes of an sm_80 GPU, from its machine code: registers, spills, shared memory, instructions.

python benchmarks/resources.py          after a build without isolation: writes results/resources.json, prints the table
python benchmarks/resources.py --show   prints the table of results/resources.json
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from environment import ROOT
from sass import Kernel, disassemble

BUILD = ROOT / "build" / "cmake"
OBJECTS = BUILD / "CMakeFiles" / "cuda_kernels.dir" / "cuda"
RESULTS = ROOT / "benchmarks" / "results" / "resources.json"

ARCHITECTURE = "sm_80"


class Multiprocessor(NamedTuple):
    """What it has room for (CUDA C++ Programming Guide, technical specifications)."""

    warps: int
    blocks: int
    shared_bytes: int


# By the KiB of shared memory that a block may have there: compute capability 8.0, and 8.6. Newer ones have no less.
MULTIPROCESSORS = {163: Multiprocessor(64, 32, 164 * 1024), 99: Multiprocessor(48, 16, 100 * 1024)}
REGISTERS = 65536
SHARED_BYTES_TAKEN = 1024  # for each block by the system
REGISTERS_GRANULE = 256  # of a warp
QUARTERS = 4  # a warp's registers are in one quarter of a multiprocessor

ELEMENTS = {"bfloat16_t": "bf16", "half_t": "fp16"}
COUNTED = ("HMMA", "LDSM", "LDGSTS", "BAR", "LDL", "STL")

# The kernels with matrix products, by the names of their Work (csrc/cuda/kernel.h), and that Work itself.
TILES = {
    "Forward": "Forward<cute::bfloat16_t, {}, {}>",
    "Backward<true>": "Backward<cute::bfloat16_t, {}, {}, true>",  # dq by atomics
    "Backward<false>": "Backward<cute::bfloat16_t, {}, {}, false>",  # deterministic: without dq
    "BackwardDq": "BackwardDq<cute::bfloat16_t, {}, {}>",
}


def product(m: int, n: int, k: int, warps: int, along_rows: int, a_in_registers: bool = False) -> Counter[str]:
    """What one warp needs for an [m, n] product over k: m16n8k16, and operands from shared memory 16 x 16 a time."""
    rows, columns, slices = m // along_rows // 16, n // (warps // along_rows) // 16, k // 16
    loads = columns + (0 if a_in_registers else rows)
    return Counter(HMMA=rows * 2 * columns * slices, LDSM=loads * slices)


def load(rows: int, head_dim: int, threads: int) -> Counter[str]:
    """What one thread needs to bring a tile to shared memory, 16 bytes a time."""
    return Counter(LDGSTS=rows * head_dim * 2 // 16 // threads)


STATISTICS = Counter(LDGSTS=1)  # log-sum-exp and delta of a tile of rows, a float a thread


def forward_counts(tile: dict[str, int], head_dim: int) -> Counter[str]:
    rows, keys, warps, threads = tile["rows"], tile["keys"], tile["warps"], tile["threads"]
    step = product(rows, keys, head_dim, warps, warps)
    step += product(rows, head_dim, keys, warps, warps, a_in_registers=True)
    step += load(keys, head_dim, threads) + load(keys, head_dim, threads)  # this V, the next K
    # The code has the step twice, masked and unmasked. Before come q and as many K as there are buffers.
    return load(rows + tile["key_buffers"] * keys, head_dim, threads) + step + step


def backward_counts(tile: dict[str, int], head_dim: int, with_dq: bool) -> Counter[str]:
    rows, keys, warps, threads = tile["rows"], tile["keys"], tile["warps"], tile["threads"]
    scores = product(rows, keys, head_dim, warps, tile["score_warps"])  # and their gradient
    dkv = product(keys, head_dim, rows, warps, tile["dkv_warps"])  # dk, dv
    dq = product(rows, head_dim, keys, warps, tile["dq_warps"]) if with_dq else Counter()
    row_tiles = load(2 * rows, head_dim, threads) + STATISTICS  # q, dout, statistics: the first, then the next
    return scores + scores + dkv + dkv + dq + row_tiles + row_tiles + load(2 * keys, head_dim, threads)


def dq_counts(tile: dict[str, int], head_dim: int) -> Counter[str]:
    rows, keys, warps, threads = tile["rows"], tile["keys"], tile["warps"], tile["threads"]
    scores = product(rows, keys, head_dim, warps, tile["score_warps"])
    dq = product(rows, head_dim, keys, warps, tile["dq_warps"])
    key_tiles = load(2 * keys, head_dim, threads)  # k, v: the first, then the next
    row_tiles = load(2 * rows, head_dim, threads) + STATISTICS  # q, dout, statistics
    return scores + scores + dq + row_tiles + key_tiles + key_tiles


EXPECTED = {
    "Forward": forward_counts,
    "Backward<true>": partial(backward_counts, with_dq=True),
    "Backward<false>": partial(backward_counts, with_dq=False),
    "BackwardDq": dq_counts,
}


def blocks_per_multiprocessor(threads: int, registers: int, shared_bytes: int, kib: int = 163) -> int:
    warps, most = threads // 32, MULTIPROCESSORS[kib]
    of_a_warp = -(-registers * 32 // REGISTERS_GRANULE) * REGISTERS_GRANULE
    by_registers = REGISTERS // QUARTERS // of_a_warp * QUARTERS // warps
    by_shared_memory = most.shared_bytes // (shared_bytes + SHARED_BYTES_TAKEN)
    return min(by_registers, by_shared_memory, most.warps // warps, most.blocks)


def find(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in {text!r}"
    return found


def ptxas_log(text: str, architecture: str = ARCHITECTURE) -> dict[str, dict[str, int]]:
    """What `ptxas -v` says of an architecture's code, by mangled name."""
    kernels = {}
    for part in text.split("Compiling entry function '")[1:]:
        if not part.partition("\n")[0].endswith(f"for '{architecture}'"):
            continue
        # The first frame is the kernel's; functions that it calls follow with theirs.
        frame = find(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"Used \d+ registers.*?(\d+) bytes smem", part)
        kernels[part.partition("'")[0]] = {
            "registers": int(find(r"Used (\d+) registers", part)[1]),
            "stack": int(frame[1]),
            "spill_stores": int(frame[2]),
            "spill_loads": int(frame[3]),
            "static_shared": int(shared[1]) if shared else 0,
        }
    return kernels


def compile_command(unit: str) -> list[str]:
    """How the build compiles a unit, without its source and output."""
    (entry,) = (x for x in json.loads((BUILD / "compile_commands.json").read_text()) if x["file"].endswith(unit))
    command = shlex.split(entry["command"])
    return command[: command.index("-x")]


def tiles(variants: set[tuple[int, int]]) -> dict[tuple[str, int, int], dict[str, int]]:
    """Threads, shared memory and tile of the kernels in TILES, by kernel and variant, from the headers themselves.

    A variant is a head dim and the shared memory of a GPU.
    """
    rows = "".join(
        f'print("{kernel}", {head_dim}, {kib}, {tile.format(head_dim, kib)}{{}});\n'
        for kernel, tile in TILES.items()
        for head_dim, kib in sorted(variants)
    )
    program = f"""
        #include <cstdio>
        #include "kernel_bwd.h"
        #include "kernel_fwd.h"
        using namespace longlora::cuda;
        void print(const ForwardTile& tile) {{
          std::printf("rows %d keys %d warps %d key_buffers %d", tile.rows, tile.keys, tile.warps, tile.key_buffers);
        }}
        void print(const BackwardTile& tile) {{
          std::printf("rows %d keys %d warps %d score_warps %d dkv_warps %d dq_warps %d stages %d", tile.rows,
                      tile.keys, tile.warps, tile.score_warps, tile.dkv_warps, tile.dq_warps, tile.stages);
        }}
        template <class Work>
        void print(const char* kernel, int head_dim, int kib, Work) {{
          std::printf("%s %d %d threads %d dynamic_shared %d ", kernel, head_dim, kib, Work::kThreads,
                      kSharedBytes<Work>);
          print(Work::kTile);
          std::printf("\\n");
        }}
        int main() {{ {rows} }}
    """
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "tiles.cu", Path(folder) / "tiles"
        source.write_text(program)
        command = [*compile_command("forward_64_163.cu"), "-x", "cu", str(source), "-o", str(binary)]
        subprocess.run(command, cwd=BUILD, check=True, capture_output=True)
        printed = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in printed.splitlines():
        kernel, head_dim, kib, *fields = line.split()
        found[kernel, int(head_dim), int(kib)] = dict(zip(fields[::2], map(int, fields[1::2]), strict=True))
    return found


def built_units() -> list[str]:
    """Names such as backward_64_163, by direction, head dim and the shared memory of a GPU."""
    names = [path.name.removesuffix(".cu.o") for path in OBJECTS.glob("*.cu.o")]
    return sorted(names, key=lambda name: (name.partition("_")[0], *variant_of(name)))


def build_log(unit: str) -> str:
    return (OBJECTS / f"{unit}.cu.o.log").read_text()


def variant_of(unit: str) -> tuple[int, int]:
    _, head_dim, kib = unit.split("_")
    return int(head_dim), int(kib)


def measure_unit(name: str, tile_table: dict[tuple[str, int, int], dict[str, int]]) -> Iterator[dict[str, Any]]:
    """One row for each kernel of a unit such as backward_64_163."""
    head_dim, kib = variant_of(name)
    log = ptxas_log(build_log(name))
    machine_code = disassemble(OBJECTS / f"{name}.cu.o", ARCHITECTURE)
    assert log.keys() == machine_code.keys(), f"{name}: ptxas and cuobjdump see different kernels"
    mangled = sorted(log)
    demangled = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    for symbol, readable in zip(mangled, demangled, strict=True):
        parts = find(r"(\w+)<cutlass::(\w+), \d+, \d+(?:, (\w+))?>", readable)  # Work<Element, head dim, KiB, more>
        kernel, element = f"{parts[1]}<{parts[3]}>" if parts[3] else parts[1], ELEMENTS[parts[2]]
        tile = tile_table.get((kernel, head_dim, kib))
        row: dict[str, Any] = {"kernel": kernel, "dtype": element, "head_dim": head_dim, "kib": kib} | log[symbol]
        if tile:
            shared = row["static_shared"] + tile["dynamic_shared"]
            blocks = blocks_per_multiprocessor(tile["threads"], row["registers"], shared, kib)
            row |= {"tile": tile, "blocks_per_multiprocessor": blocks}
        code: Kernel = machine_code[symbol]
        everywhere, in_loops = code.count(), code.count(code.product_loops)
        yield row | {
            "instructions": {kind: everywhere[kind] for kind in COUNTED},
            "in_product_loops": {kind: in_loops[kind] for kind in COUNTED},
        }


def measure() -> dict[str, Any]:
    units = built_units()
    assert units, f"no objects in {OBJECTS}: build with nvcc first (pip install -e . --no-build-isolation)"
    tile_table = tiles({variant_of(unit) for unit in units})
    return {
        "nvcc": nvcc_version(),
        "architecture": ARCHITECTURE,
        "kernels": [row for unit in units for row in measure_unit(unit, tile_table)],
    }


def nvcc_version() -> str:
    """Of the nvcc that the build folder was configured with."""
    says = subprocess.run([compile_command("forward_64_163.cu")[0], "--version"], capture_output=True, text=True)
    return find(r"V([\d.]+)", says.stdout)[1]


def table(kernels: list[dict[str, Any]]) -> str:
    head = "| kernel | dtype | head dim | for GPUs of, KiB | threads | registers | spill stores, loads | shared, KiB "
    head += "| blocks / SM "
    head += "".join(f"| {kind} " for kind in COUNTED) + "|\n" + "|---|---" + "|---:" * (7 + len(COUNTED)) + "|\n"
    lines = []
    for row in kernels:
        tile = row.get("tile", {})
        cells = [
            f"`{row['kernel']}`",
            row["dtype"],
            row["head_dim"],
            row["kib"],
            tile.get("threads", ""),
            row["registers"],
            f"{row['spill_stores']}, {row['spill_loads']}",
            f"{(row['static_shared'] + tile['dynamic_shared']) / 1024:.1f}" if tile else "",
            row.get("blocks_per_multiprocessor", ""),
            *(
                f"{row['instructions'][kind]}" + (f" ({row['in_product_loops'][kind]})" if tile else "")
                for kind in COUNTED
            ),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return head + "\n".join(lines) + "\n\nIn brackets: in the innermost loops with matrix products.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="the table that is there, nothing measured")
    if not parser.parse_args().show:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())["kernels"]))


if __name__ == "__main__":
    main()
