"""How long the tests wait: limits are there to end what hangs, not to tell a slow machine from a fast one.

The environment variable LONGLORA_TEST_PATIENCE multiplies them all: 3 on a machine with much else to do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

FACTOR = float(os.environ.get("LONGLORA_TEST_PATIENCE", "1"))


def patience(seconds: float = 3600) -> float:
    """A limit in seconds, for `timeout=` and the like. The default is far beyond what any command of a test takes."""
    return seconds * FACTOR


def wait_until(happened: Callable[[], object], still: Callable[[], bool] = lambda: True) -> None:
    """Return when something has happened; fail if it has not while `still` holds, or within our patience."""
    end = time.monotonic() + patience()
    while not happened():
        assert still(), "it will not happen any more"
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
