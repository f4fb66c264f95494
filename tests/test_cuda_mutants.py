"""Whether the tests of the emulated CUDA kernels can fail: each of these mistakes in the kernels must be found by
tests/test_cuda_emulated.py.
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

pytestmark = pytest.mark.full


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
