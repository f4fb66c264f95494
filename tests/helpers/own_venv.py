"""A virtual environment of a test's own, for other people's programs that are no part of what is installed here."""

from __future__ import annotations

import re
import site
import subprocess
import sys
from pathlib import Path

import pytest


def make_venv(folder: Path, *packages: str) -> Path:
    """Make one on top of the present environment, so that torch and transformers are not installed again.

    Args:
        folder: Where to; it must not exist.
        packages: What pip installs, as on its command line; nothing if there are none.

    Returns:
        The interpreter in it.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (packages_folder,) = folder.glob("lib/python*/site-packages")
    (packages_folder / "beneath.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = folder / "bin" / "python"
    if packages:
        pip(python, "install", "--no-compile", *packages)  # few of their modules are imported
    return python


def pip(python: Path | str, *arguments: object) -> None:
    """Run pip. Without a network the test is skipped, and says so."""
    command = [str(python), "-m", "pip", *map(str, arguments), "-q", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and re.search(r"(?i)connection|resolve host|timed out|retries", done.stderr):
        pytest.skip(f"NOT TESTED: the package registry cannot be reached: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]
