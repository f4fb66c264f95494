"""Whether two runs were the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from app.runs.checkpoints import complete_checkpoints
from finetune_runs import losses


def assert_same_run(output: Path, undisturbed: Path) -> None:
    ours, theirs = losses(output), losses(undisturbed)
    assert list(ours) == list(theirs) == list(range(1, len(theirs) + 1))
    assert ours == pytest.approx(theirs, abs=1e-4)
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (output, undisturbed)]
    for name, weight in weights[1].items():
        assert (weights[0][name] - weight).abs().max() <= 1e-4, name
    tables = [json.loads((folder / "perplexity.json").read_text())["perplexity"] for folder in (output, undisturbed)]
    assert list(tables[0]) == ["before", "scaling only", "after"]
    for row in ("before", "scaling only", "after"):
        assert tables[0][row] == pytest.approx(tables[1][row], rel=1e-4)
    assert list(complete_checkpoints(output)) == list(complete_checkpoints(undisturbed))
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == [".lock"]
