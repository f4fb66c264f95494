"""Mistakes planted in the CUDA kernels: all of them in one build, from which the environment chooses.

Compiling the kernels takes a minute, and what a mistake changes in them is seldom more than an expression.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import forks
import simt_build
from forked_mutants import CHOSEN, RUNS
from simt_build import Kernel

SWITCH = f"""#pragma once
#include <cstdlib>
// Which of the mistakes is made; 0: none.
inline const int mutant = std::getenv("{CHOSEN}") ? std::atoi(std::getenv("{CHOSEN}")) : 0;
"""


class Mutant(NamedTuple):
    file: str
    right: str  # an expression
    wrong: str  # another
    found_by: str  # a test of the emulated kernels, or a sanitizer
    where: str = "{}"  # `right` and what stands around it; this stands in the file once


def plant(csrc: Path, mutants: Mapping[str, Mutant]) -> None:
    """Make each expression `right` a choice between it and its `wrong` ones. Mutants count from 1, in their order."""
    (csrc / "mutant.h").write_text(SWITCH)
    choices: dict[str, dict[tuple[int, str], str]] = defaultdict(lambda: defaultdict(str))
    for number, (file, right, wrong, _, where) in enumerate(mutants.values(), 1):
        text, place = (csrc / file).read_text(), where.replace("{}", right, 1)
        assert text.count(place) == 1, f"{place!r} in {file}"
        at = text.index(place) + where.index("{}")
        choices[file][at, right] += f"mutant == {number} ? ({wrong}) : "
    for file, places in choices.items():
        text, end = (csrc / file).read_text(), None
        for (at, right), choice in sorted(places.items(), reverse=True):
            assert end is None or at + len(right) <= end, f"{right!r} reaches into another place in {file}"
            end = at
            text = f"{text[:at]}({choice}{right}){text[at + len(right) :]}"
        (csrc / file).write_text(f'#include "{csrc}/mutant.h"\n{text}')


def copy_sources(to: Path) -> Path:
    """A copy of the sources and what their tests import, which builds by itself. Returns its root."""
    for folder in ("csrc", "tests", "benchmarks", "examples"):
        shutil.copytree(simt_build.ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(simt_build.ROOT / "pyproject.toml", to)
    return to


def run_tests(tree: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Pytest over both tiers of the emulated kernels' tests."""
    words = ["-m", "pytest", "--full", "-q", "-p", "no:cacheprovider", *options]
    files = sorted((tree / "tests" / "kernels").glob("test_cuda_emulated_*.py"))
    return forks.run([*words, *files], os.environ | environment, modules=("hypothesis", "pytest", "torch"), folder=tree)


def run_mutants(tree: Path, expression: str, tests: Mapping[int, Collection[str]]) -> dict[int, tuple[str, str]]:
    """Each mutant in its tests, which are named as pytest does, and are among those that `-k expression` selects.

    Returns what became of it, "passed", "failed", "crashed" or "not run", and what that said.
    """
    shutil.copy(Path(__file__).with_name("forked_mutants.py"), tree / "conftest.py")
    runs = tree / "runs.json"
    runs.write_text(json.dumps({mutant: sorted(names) for mutant, names in tests.items()}))
    result = run_tests(tree, "-k", expression, **{RUNS: str(runs)})
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = json.loads(runs.with_suffix(".outcomes").read_text())
    return {int(mutant): tuple(outcome) for mutant, outcome in outcomes.items()}


def build_kernels(tree: Path, kernels: Sequence[Kernel], sanitizer: str | None, dtypes: Sequence[str]) -> Path:
    """The module of a copy's kernels."""
    wanted = ", ".join(f"simt_build.Kernel{tuple(kernel)}" for kernel in kernels)
    build = f"import simt_build; print(simt_build.build_kernels([{wanted}], {sanitizer!r}, {dtypes}))"
    command = [sys.executable, "-c", build]
    return Path(
        subprocess.run(
            command, cwd=tree / "tests" / "helpers", capture_output=True, text=True, check=True
        ).stdout.strip()
    )
