"""Whether the tests of the emulated CUDA kernels can fail: each of these mistakes must be found by the one named.

Left-out barriers, commits and waits are the business of test_each_site_is_needed, which needs no other source.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import forks
from cuda_mutants import build_kernels, copy_sources, plant, run_mutants, run_tests
from emulated_mutants import CONFIG, MUTANTS
from finetune_runs import environment
from simt_build import Kernel

#: In a process of its own, as one loads no second module of kernels.
SWIZZLED = """
import sys
from pathlib import Path
import torch
import simt_build, simt_kernels
from emulated import assert_no_bank_conflicts
from longlora_ext.reference import s2attn_reference
from op_checks import Problem, assert_close_to_reference

module = simt_build.load(Path(sys.argv[1]))
module.configure()
q, k, v = Problem(seqlen=150, head_dim=64, dtype=torch.float16).tensors()
out, _ = simt_kernels.forward(module, q, k, v, 150)
plain, exact = (s2attn_reference(*inputs, 150)[0] for inputs in ((q, k, v), (q.double(), k.double(), v.double())))
assert_close_to_reference(out, plain, exact)
print("results are right")
assert_no_bank_conflicts(module)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_sources(tmp_path_factory.mktemp("mutants") / "tree")
    plant(tree / "csrc", MUTANTS)
    return tree


def pytest_name(found_by: str) -> str:
    """With the kernel, as pytest has it."""
    test, bracket, case = found_by.partition("[")
    return f"{test}[{CONFIG}-{case}" if bracket else f"{test}[{CONFIG}]"


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tree: Path) -> dict[int, tuple[str, str]]:
    """What became of the selected mutants, each in its test, and of none of them in the tests of all."""
    items = [item for item in request.session.items if item.getparent(pytest.Module) is request.node]
    selected = [item.callspec.params for item in items if hasattr(item, "callspec")]
    tests = {0: {pytest_name(mutant.found_by) for mutant in MUTANTS.values()}}
    tests |= {chosen["number"]: {pytest_name(MUTANTS[chosen["name"]].found_by)} for chosen in selected}
    return run_mutants(tree, CONFIG, tests)


def test_each_mutant_has_its_place_and_its_test(tree: Path) -> None:
    """Nothing is compiled: what a change of the sources or the tests has moved shows within seconds."""
    found = {line.partition("::")[2] for line in run_tests(tree, "-k", CONFIG, "--collect-only").stdout.splitlines()}
    assert {pytest_name(mutant.found_by) for mutant in MUTANTS.values()} <= found


@pytest.mark.full
def test_no_mutant_no_failure(outcomes: dict[int, tuple[str, str]]) -> None:
    assert outcomes[0] == ("passed", "")


@pytest.mark.full
@pytest.mark.parametrize("number, name", list(enumerate(MUTANTS, 1)))
def test_mutants_are_found(outcomes: dict[int, tuple[str, str]], number: int, name: str) -> None:
    """A crash is found too: of what comes before the test nothing crashes without a mutant."""
    found, how = outcomes[number]
    assert found in ("failed", "crashed"), how


@pytest.mark.full
def test_other_swizzle_is_found(tree: Path) -> None:
    """By its bank conflicts: results stay right."""
    layouts = tree / "csrc" / "cuda" / "layouts.h"
    text = layouts.read_text()
    assert text.count("Swizzle<3, 3, 3>") == 1
    layouts.write_text(text.replace("Swizzle<3, 3, 3>", "Swizzle<2, 3, 3>"))
    try:  # the forward of head dim 64 compiles in a third of the time of a forward and a backward of 128
        module = build_kernels(tree, [Kernel("forward", 64, 163)], None, ["fp16"])
    finally:
        layouts.write_text(text)
    path = os.pathsep.join([str(Path(forks.__file__).parent), environment()["PYTHONPATH"]])
    done = forks.run(["-c", SWIZZLED, module], environment() | {"PYTHONPATH": path}, modules=("hypothesis", "torch"))
    assert done.stdout == "results are right\n" and "AssertionError: bank conflicts" in done.stderr, done.stderr
