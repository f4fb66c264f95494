"""Whether the tests of the emulated CUDA kernels can fail: each of many small mistakes in csrc/cuda must be found, most
by tests/test_cuda_emulated.py, those that leave the results right by a sanitizer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import simt_build
from simt_build import Kernel

pytestmark = pytest.mark.full

SANITIZED = (Kernel("backward", "fp16", 64), Kernel("forward", "fp16", 64))


class Mutant(NamedTuple):
    file: str
    right: str  # stands there once
    wrong: str
    config: str = "bf16-64"  # whose tests are to find it
    message: str = "FAILED"


MUTANTS = {
    "shift": Mutant("groups.h", "shifted ? group_size / 2 :", "shifted ? group_size / 2 + 1 :"),
    "start of documents": Mutant("groups.h", "doc_start + (group > 0 ? group : 0)", "doc_start + group"),
    "doc_start unclamped": Mutant("cuda/mask.h", "cute::max(0, cute::min(doc_start[row], row))", "doc_start[row]"),
    "left mask": Mutant("cuda/mask.h", "j < first ||", "j + 1 < first ||"),
    "causal mask": Mutant("cuda/mask.h", "j > last)", "j > last + 1)"),
    "diagonal unmasked": Mutant("cuda/mask.h", "key + keys - 1 > row ||", "key > row ||"),
    "left border unmasked": Mutant("cuda/mask.h", "|| key < highest", "|| key < lowest"),
    "swizzle": Mutant("cuda/layouts.h", "Swizzle<3, 3, 3>", "Swizzle<2, 3, 3>", message=r"assert \[[\d, ]*[1-9]"),
    "tile of keys missing": Mutant("cuda/mainloop_fwd.h", "= rows.lowest / kKeys,", "= (rows.lowest + 64) / kKeys,"),
    "tiles of keys for nothing": Mutant("cuda/mainloop_fwd.h", "= rows.lowest / kKeys,", "= 0 / kKeys,"),
    "last tile of keys": Mutant(
        "cuda/mainloop_fwd.h", "(cute::min(row + kRows, seqlen) - 1) / kKeys", "row / kKeys", "fp16-128"
    ),
    "KV head": Mutant("cuda/mainloop_fwd.h", "head / (problem.heads / problem.kv_heads)", "head % problem.kv_heads"),
    "out not rescaled": Mutant("cuda/softmax.h", "out(m, n) *= shrink;", ";"),
    "log-sum-exp": Mutant("cuda/softmax.h", "maximum[m] * scale_log2 * kLn2 +", "maximum[m] * scale_log2 +"),
    "log-sum-exp past the end": Mutant("cuda/kernel_forward.h", "&& i < rows)", "&& i <= rows)"),
    "tiles without a block": Mutant("cuda/scheduler.h", "(tiles + tiles_per_group / 2 +", "(tiles +"),
    "rows loaded": Mutant(
        "cuda/copy.h", "inside = get<0>(where(0, m, k)) < rows", "inside = get<0>(where(0, m, k)) <= rows"
    ),
    "columns loaded": Mutant("cuda/copy.h", "get<1>(where(0, m, k)) < columns;", "get<1>(where(0, m, k)) <= columns;"),
    "rows stored": Mutant("cuda/copy.h", "if (get<0>(where(0, m, k)) < rows", "if (get<0>(where(0, m, k)) <= rows"),
    "columns stored": Mutant("cuda/copy.h", "get<1>(where(0, m, k)) < columns)", "get<1>(where(0, m, k)) <= columns)"),
    "delta": Mutant("cuda/bwd_tiles.h", "(gradient(m, n) - delta[m])", "gradient(m, n)"),
    "scale of dk": Mutant("cuda/mainloop_bwd.h", "scale_by(dk, static_cast<float>(problem.scale));", ""),
    "scale of dq": Mutant("cuda/bwd_around.h", "* static_cast<float>(params.problem.scale)", ""),
    "dq's sums not begun": Mutant("cuda/bwd_around.h", "sums[i] = 0;", ";"),
    "walk ends early": Mutant("cuda/mainloop_bwd.h", "first_key(row) <= last_key", "first_key(row) < last_key"),
    "walk ends late": Mutant("cuda/mainloop_bwd.h", "first_key(row) <= last_key", "first_key(row) >= 0"),
    "stage": Mutant("cuda/mainloop_bwd.h", "load_stage(walk, stage ^ 1)", "load_stage(walk, stage)"),
}

# What a row past the end reads is multiplied by zeros; and the emulator's blocks run one after the other, so that their
# sums need no atomics to come right.
LEFT_TO_SANITIZERS = {
    "address": Mutant("cuda/bwd_tiles.h", "lse_log2[m] = inside ?", "lse_log2[m] = true ?", message="heap-buffer-over"),
    "thread": Mutant(
        "cuda/mainloop_bwd.h",
        "atomic_add(sums + i * kThreads, dq(i))",
        "sums[i * kThreads] += dq(i)",
        message="data race",
    ),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources and tests, which builds by itself."""
    tree = tmp_path_factory.mktemp("mutants")
    for folder in ("csrc", "tests", "benchmarks"):
        shutil.copytree(simt_build.ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(simt_build.ROOT / "pyproject.toml", tree)
    return tree


@contextmanager
def mutated(tree: Path, mutant: Mutant) -> Iterator[None]:
    path = tree / "csrc" / mutant.file
    text = path.read_text()
    assert text.count(mutant.right) == 1, f"{mutant.right!r} in {mutant.file}"
    path.write_text(text.replace(mutant.right, mutant.wrong))
    try:
        yield
    finally:
        path.write_text(text)


def run_tests(tree: Path, config: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", config]
    return subprocess.run([*command, "tests/test_cuda_emulated.py"], cwd=tree, capture_output=True, text=True)


@pytest.mark.parametrize("config", sorted({mutant.config for mutant in MUTANTS.values()}))
def test_no_mutant_no_failure(tree: Path, config: str) -> None:
    result = run_tests(tree, config)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(tree: Path, name: str) -> None:
    """By a test that fails: where a mutant does not even compile, none does."""
    mutant = MUTANTS[name]
    with mutated(tree, mutant):
        result = run_tests(tree, mutant.config)
    assert "FAILED tests/test_cuda_emulated.py" in result.stdout, result.stdout
    assert re.search(mutant.message, result.stdout), result.stdout


def run_under(sanitizer: str, module: Path) -> subprocess.CompletedProcess[str]:
    return simt_build.run_sanitized(sanitizer, simt_build.ROOT / "tests" / "cuda_sanitized.py", module)


@pytest.mark.parametrize("sanitizer", LEFT_TO_SANITIZERS)
def test_sanitizers_find_nothing(sanitizer: str) -> None:
    result = run_under(sanitizer, simt_build.build_kernels(SANITIZED, sanitizer))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("sanitizer", LEFT_TO_SANITIZERS)
def test_sanitizers_find_mutants(tree: Path, sanitizer: str) -> None:
    mutant = LEFT_TO_SANITIZERS[sanitizer]
    kernels = list(map(tuple, SANITIZED))
    build = f"""if True:
        import simt_build
        print(simt_build.build_kernels([simt_build.Kernel(*kernel) for kernel in {kernels}], {sanitizer!r}))"""
    with mutated(tree, mutant):
        built = subprocess.run(
            [sys.executable, "-c", build], cwd=tree / "tests", capture_output=True, text=True, check=True
        )
    result = run_under(sanitizer, Path(built.stdout.strip()))
    assert result.returncode and re.search(mutant.message, result.stderr), result.stderr
