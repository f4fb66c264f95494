"""Which of the emulated kernels a test of them runs on, and the module that they are in."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

import simt_build
import simt_kernels
from emulated import CONFIGS, ONE_DTYPE, Config


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All kernels are compared with the definition. All else is asked of one dtype: they are slow here."""
    if "config" in metafunc.fixturenames:
        other = metafunc.definition.get_closest_marker("other_dtype") is not None
        metafunc.parametrize("config", [config for config in CONFIGS if other != (config.id in ONE_DTYPE)])


@pytest.fixture
def module(request: pytest.FixtureRequest, config: Config) -> Iterator[ModuleType]:
    """All kernels that the selected tests are about, and no others: compiling one takes half a minute.

    They run on a GPU that offers a block as much shared memory as they are made for.
    """
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    configs = {chosen["config"] for chosen in parameters if isinstance(chosen.get("config"), Config)}
    kernels = simt_build.kernels_for((each.head_dim, each.kib) for each in configs)
    module = simt_kernels.kernels(*kernels, dtypes=frozenset(each.dtype for each in configs))
    module.pretend(shared_memory_bytes=config.kib * 1024)
    yield module
    module.configure()  # whoever comes next finds nothing left out
    module.pretend()
