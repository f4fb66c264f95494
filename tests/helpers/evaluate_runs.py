"""Texts to run examples/evaluate.py on, and the ways to run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import evaluate


def make_books(folder: Path) -> Path:
    """Texts: one shorter than the context of `make_model`, two longer ones, one four times as long."""
    for number, size in enumerate((20, 50, 70, 140)):
        (folder / f"{number}.txt").write_text("".join(chr(97 + (i * i + number) % 26) for i in range(size)))
    return folder


def run(task: str, *arguments: object, output: str = "out") -> dict:
    """What the program writes."""
    evaluate.main([task, "--output", output, *map(str, arguments)])
    return json.loads((Path(output) / "results.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str], task: str, *arguments: object) -> str:
    """What the program says when it refuses."""
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([task, *map(str, arguments)])
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate.py: error: ")]
    assert len(said) == 1
    return said[0]
