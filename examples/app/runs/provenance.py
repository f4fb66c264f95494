"""What a result depends on besides its arguments: the versions of libraries, and the commit of this program."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "longlora-ext", "torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "tokenizers", "safetensors",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """What is installed of all that a result may depend on."""
    installed: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def commit() -> str | None:
    """The commit that this program is at, where it lies in a checkout; "+" for one with changes."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
