"""Two tiers: `pytest` covers every feature, `pytest --full` adds what is slow (old versions, sweeps, long shapes)."""

import os
import sys
from pathlib import Path

# Nothing here may reach for a hub, and two test processes must not fight over the cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for work keep other processes from it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the slow tier as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --full the slow tier is deselected, not skipped: a skip means that something could not be checked."""
    if config.getoption("--full"):
        return
    full = [item for item in items if item.get_closest_marker("full")]
    if full:
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
