"""The file of results: what was found of each arm, and what it was measured on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from app.runs.json_files import with_numbers, write_json
from app.runs.precision import machine_dtype
from app.runs.provenance import commit
from extending.arms import ARMS
from longlora_ext.env import processor


def made(kind: str) -> dict[str, Any]:
    """What an arm was measured on."""
    device = torch.cuda.get_device_name() if kind == "cuda" else processor()
    return {
        "device": device,
        "dtype": str(machine_dtype()).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }


def check_setting(path: Path, setting: dict[str, Any]) -> None:
    """Raise `ValueError` if a file of results is of another model, text or context."""
    if path.exists() and (there := json.loads(path.read_text())["setting"]) != setting:
        raise ValueError(f"{path} holds another experiment: {there}; give another --results")


def claim(work: Path, setting: dict[str, Any]) -> None:
    """Make a folder that of a setting's arms, or raise `ValueError` if it has those of another: they are not measured
    again, and would be taken for this one's."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "setting.json"
    if path.exists() and (there := json.loads(path.read_text())) != setting:
        raise ValueError(f"{work} holds arms of another experiment: {there}; give another --work")
    write_json(path, setting)


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds; where there is none, what is measured now, and written to it."""
    if not path.exists():
        began = time.perf_counter()
        write_json(path, measure())
        print(f"{path.name} written after {time.perf_counter() - began:.0f} s", flush=True)
    return dict(json.loads(path.read_text()))


def add(path: Path, result: dict[str, Any], setting: dict[str, Any]) -> None:
    """Put the result of an arm into the file of results, for an earlier one of the same rate, seed and steps."""
    check_setting(path, setting)
    there: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"setting": setting, "arms": []}
    others = [r for r in there["arms"] if _place(r) != _place(result)]
    there["arms"] = sorted([*others, result], key=_place)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, there)


def read(path: Path) -> dict[str, Any]:
    """What a file of results holds; the numbers of an arm that diverged need not be finite."""
    return dict(with_numbers(json.loads(path.read_text())))


def _place(result: dict[str, Any]) -> tuple[int, int, float, int]:
    """Where a result stands among the others, of which each has a place of its own."""
    training = result["training"] or {"steps": 0, "learning_rate": 0.0}
    return list(ARMS).index(result["arm"]), training["steps"], training["learning_rate"], result["seed"]
