"""Which of the emulated kernels a test of them runs on, and the module that they are in."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

import simt_build
import simt_kernels
from emulated import CONFIGS, FAST, ONE_DTYPE, Config


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All kernels are compared with the definition. All else is asked of one dtype: they are slow here."""
    if "config" in metafunc.fixturenames:
        other = metafunc.definition.get_closest_marker("other_dtype") is not None
        metafunc.parametrize("config", [config for config in CONFIGS if other != (config.id in ONE_DTYPE)])


@pytest.fixture(scope="session")
def configs(request: pytest.FixtureRequest) -> frozenset[Config]:
    """What the selected tests are about, and no more, since compiling a kernel takes half a minute. A test of no config
    in particular has those of the fast tier."""
    items = [item for item in request.session.items if "kernels" in getattr(item, "fixturenames", ())]
    chosen = [item.callspec.params["config"] if "config" in item.fixturenames else None for item in items]
    return frozenset(config for config in chosen if config) | frozenset(FAST if None in chosen else ())


@pytest.fixture(scope="session")
def kernels(configs: frozenset[Config]) -> ModuleType:
    """The module of them: a process can have only one."""
    wanted = simt_build.kernels_for((each.head_dim, each.kib) for each in configs)
    return simt_kernels.kernels(*wanted, dtypes=frozenset(each.dtype for each in configs))


@pytest.fixture
def module(kernels: ModuleType, config: Config) -> Iterator[ModuleType]:
    """It on a GPU that offers a block as much shared memory as a config's kernels are made for."""
    kernels.pretend(shared_memory_bytes=config.kib * 1024)
    yield kernels
    kernels.configure()  # whoever comes next finds nothing left out
    kernels.pretend()
