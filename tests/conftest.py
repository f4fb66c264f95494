"""Two tiers: `pytest` covers every feature, `pytest --full` adds what is slow (old versions, sweeps, long shapes).

LONGLORA_TEST_PATIENCE=3 multiplies all limits of time (patience.py), on a machine with much else to do.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Nothing here may reach for a hub, and two test processes must not fight over the cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for work keep other processes from it

import pytest
import torch
from hypothesis import settings

from app.runs import launch
from longlora_ext.ops import has_cuda_kernels

# On a busy machine any example may take long. Limits of time are those of patience.py.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

if not torch.cuda.is_available():  # the programs compute in fp32, whether or not the processor multiplies bf16
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")
HAS_CUDA = torch.cuda.is_available() and has_cuda_kernels()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the slow tier as well")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "only(device, reason): the test runs on this device alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `device` runs on the CPU and, where there are one and its kernels, on a GPU.

    `@pytest.mark.only("cpu", reason)` keeps it to one; without a GPU a test of CUDA alone is skipped, and says so.
    """
    if "device" not in metafunc.fixturenames:
        return
    only = metafunc.definition.get_closest_marker("only")
    devices: list = [only.args[0]] if only else ["cpu", *(["cuda"] if HAS_CUDA else [])]
    if "cuda" in devices:
        skip = [] if HAS_CUDA else [pytest.mark.skip(reason="no GPU, or no CUDA kernels in this build")]
        devices[-1] = pytest.param("cuda", marks=[pytest.mark.gpu, *skip])
    metafunc.parametrize("device", devices, indirect=True)


def has_kernel(item: pytest.Item) -> bool:
    """Whether a test's device has kernels for its dtype: on CUDA those of 16 bits alone."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return parameters.get("device") != "cuda" or parameters.get("dtype") not in (torch.float32, torch.float64)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --full the slow tier is deselected, not skipped: a skip means that something could not be checked."""
    items[:] = filter(has_kernel, items)
    if config.getoption("--full"):
        return
    full = [item for item in items if item.get_closest_marker("full")]
    if full:
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """After the slow tier: the files in which its time went."""
    if not config.getoption("--full"):
        return
    reports = [
        report
        for kind in ("passed", "failed", "error", "skipped", "")
        for report in terminalreporter.stats.get(kind, [])
    ]
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("seconds by file")
    for file, spent in seconds.most_common(20):
        terminalreporter.write_line(f"{spent:7.0f}  {file}")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program puts its name into what it says of mistakes; the next test is none of its business."""
    monkeypatch.setattr(launch, "program", "finetune_llama.py")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the test's tensors are made, without its saying so."""
    with torch.device(request.param):
        yield request.param
