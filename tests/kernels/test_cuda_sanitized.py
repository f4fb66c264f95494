"""The emulated CUDA kernels under AddressSanitizer and ThreadSanitizer, and whether these would see a mistake."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import simt_build
from cuda_mutants import CHOSEN, Mutant, build_kernels, copy_sources, plant

FOUND = {"address": "AddressSanitizer: heap-", "thread": "ThreadSanitizer: data race"}

# What leaves most results right: rows past the end are multiplied by zeros; blocks that add up without atomics are no
# mistake to the emulator, which runs one after the other.
MUTANTS = {
    "lse past the end": Mutant("cuda/bwd_tiles.h", "i < problem.seqlen", "true", "address"),
    "doc_start past the end": Mutant(
        "cuda/mask.h", "cute::min(row, seqlen - 1)", "row", "address", "document(int row) const {\n    row = {}"
    ),
    "rows of out past the end": Mutant("cuda/bwd_pre_post.h", "i < rows", "true", "address", "inside = {}"),
    "tile before the first": Mutant("cuda/scheduler.h", "turn.tile < 0", "false", "address"),
    "scratch of whole tiles": Mutant(
        "cuda/dispatch.cu", "(problem.seqlen + rows - 1) / rows", "problem.seqlen / rows", "address"
    ),
    "columns of a sink's rows": Mutant("cuda/sink_gradients.h", "piece * 8 < problem.head_dim", "true", "address"),
    "sinks past the end": Mutant("cuda/bwd_pre_post.h", "row + i < visible.seqlen", "true", "address"),
    "sums of sinks of all tiles": Mutant("cuda/sink_gradients.h", "int64_t{row_tile} * kFloats", "0", "thread"),
    "sums without atomics": Mutant(
        "cuda/mainloop_bwd.h", "atomic_add(sums + i * kThreads, dq(i))", "void(sums[i * kThreads] += dq(i))", "thread"
    ),
    "lse of the next head": Mutant("cuda/mainloop_fwd.h", "i < rows", "i <= rows", "thread"),
    "tile past the last": Mutant("cuda/scheduler.h", "turn.tile >= schedule.tiles", "false", "thread"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_sources(tmp_path_factory.mktemp("sanitized") / "tree")
    plant(tree / "csrc", MUTANTS)
    return tree


@pytest.fixture(scope="module")
def module_for(tree: Path) -> Callable[[str], Path]:
    kernels = simt_build.kernels_for([(64, 163)])
    return cache(lambda sanitizer: build_kernels(tree, kernels, sanitizer, ["fp16"]))


def run(sanitizer: str, module: Path) -> subprocess.CompletedProcess[str]:
    return simt_build.run_sanitized(sanitizer, simt_build.ROOT / "tests" / "helpers" / "cuda_sanitized.py", module)


def test_each_mutant_has_its_place(tree: Path) -> None:
    """Nothing is compiled: `plant` looks for each."""
    assert "mutant == 1 ?" in (tree / "csrc" / MUTANTS["lse past the end"].file).read_text()


@pytest.mark.full
@pytest.mark.parametrize("sanitizer", FOUND)
def test_nothing_is_found(module_for: Callable[[str], Path], sanitizer: str) -> None:
    result = run(sanitizer, module_for(sanitizer))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.full
@pytest.mark.parametrize("number, name", list(enumerate(MUTANTS, 1)))
def test_mutants_are_found(
    module_for: Callable[[str], Path], number: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sanitizer = MUTANTS[name].found_by
    monkeypatch.setenv(CHOSEN, str(number))
    result = run(sanitizer, module_for(sanitizer))
    assert result.returncode and FOUND[sanitizer] in result.stderr, result.stderr
