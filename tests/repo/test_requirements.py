"""The versions of requirements.txt can be installed on every Python that the README promises."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from finetune_runs import ROOT

LINES = [
    Requirement(line)
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
OLDEST = "3.10"  # of Python; what takes a newer one has a line of its own for it


def lines_for(python: str) -> list[Requirement]:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return [line for line in LINES if line.marker is None or line.marker.evaluate(environment)]


@pytest.mark.parametrize("python", [OLDEST, "3.11", "3.12", "3.13"])
def test_each_package_has_one_version_for_a_python(python: str) -> None:
    names = Counter(line.name for line in lines_for(python))
    assert set(names) == {line.name for line in LINES} and set(names.values()) == {1}


def test_what_every_python_gets_takes_the_oldest() -> None:
    """By what the installed packages say of themselves: a pin that has no line of its own is what is installed."""
    for line in (line for line in LINES if line.marker is None):
        takes = SpecifierSet(metadata(line.name)["Requires-Python"] or "")
        assert takes.contains(f"{OLDEST}.13"), f"{line} takes Python {takes} alone"
