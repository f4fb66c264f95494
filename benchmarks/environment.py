"""What figures were measured on: the machine, the versions, the commit, the command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from longlora_ext.env import processor

ROOT = Path(__file__).resolve().parent.parent


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: str, note: str | None) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": os.environ.get("LONGLORA_COMMIT") or output_of("git", "describe", "--always", "--dirty") or "unknown",
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "note": note,
    }
    if device == "cuda":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return found | {
            "device": torch.cuda.get_device_name(),
            "driver": driver.splitlines()[0] if driver else "unknown",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return found | {
        "device": processor(),
        "instructions": sorted({flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in cpuinfo}),
        "threads": torch.get_num_threads(),
    }
