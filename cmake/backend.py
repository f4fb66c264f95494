"""The PEP 517 build backend: setuptools', asking for torch only where the target environment has none.

pip builds in an environment of its own, but with the target's interpreter, whose site-packages are thus known. A torch
found there is built against as it is. uv hides it: LONGLORA_TORCH_DIR then names the folder of the torch package.
"""

import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

ROOT = Path(__file__).resolve().parent.parent


def torch_floor() -> str:
    """The oldest torch supported, from pyproject.toml, where it is stated."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found, "pyproject.toml states no lower bound for torch"
    return found[1]


def find_torch() -> Path | None:
    """The folder of the torch package to build against, without importing it."""
    if named := os.environ.get("LONGLORA_TORCH_DIR"):
        if not (Path(named) / "version.py").is_file():
            sys.exit(f"longlora_ext: LONGLORA_TORCH_DIR is {named}, but must be the folder of a torch package")
        return Path(named)
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    for key in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(key)) / "torch"
        if (folder / "version.py").is_file():
            return folder
    return None


def torch_version(folder: Path) -> str:
    found = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return found[1] if found else "unknown"


def check_torch(folder: Path) -> None:
    """Stops the build, in one line, where torch is too old."""

    def number(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version)[:2])

    version, floor = torch_version(folder), torch_floor()
    if number(version) < number(floor):
        sys.exit(f"longlora_ext: torch {version} found in {folder}, but {floor} or newer is needed")


def _requires() -> list[str]:
    folder = find_torch()
    if folder:
        check_torch(folder)
        return []
    return [f"torch>={torch_floor()}"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _requires()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _requires()
