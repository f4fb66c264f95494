"""The conftest.py of a tree of mutants (cuda_mutants.py): pytest collects once and runs each mutant in a fork.

A pytest for each would take a second of its own to import and collect, several times what a test takes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

RUNS = "LONGLORA_MUTANT_RUNS"  # the file of what is to be run: by mutant, the names of its tests
CHOSEN = "LONGLORA_MUTANT"


def outcome_of(items: list[pytest.Item]) -> tuple[str, str]:
    """Whether they passed or one failed, and what that said. What comes before or after a test must not fail."""
    for item in items:
        for report in runtestprotocol(item, log=False):
            if not report.passed:
                return "failed" if report.when == "call" else "not run", f"{item.nodeid}: {report.longreprtext}"
    return "passed", ""


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    if RUNS not in os.environ:
        return None
    runs = Path(os.environ[RUNS])
    items = {item.name: item for item in session.items}
    outcomes = {}
    for mutant, tests in json.loads(runs.read_text()).items():
        said = runs.with_name(f"{mutant}.txt")
        said.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                os.environ[CHOSEN] = mutant
                said.write_text(json.dumps(outcome_of([items[test] for test in tests])))
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcomes[mutant] = json.loads(said.read_text()) if code == 0 else ("crashed", f"with {code}")
    runs.with_suffix(".outcomes").write_text(json.dumps(outcomes))
    return True
