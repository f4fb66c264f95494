"""The example to copy: short, of few imports, and it runs (examples/minimal.py)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

import minimal
from longlora_ext.adapter import load
from longlora_ext.config import context_length

ALLOWED = {"torch", "transformers", "peft", "longlora_ext", *sys.stdlib_module_names}


def test_it_is_short_and_imports_little() -> None:
    text = Path(minimal.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    nodes = list(ast.walk(ast.parse(text)))
    names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert names and {name.partition(".")[0] for name in names} <= ALLOWED
    assert not [name for name in names if "._" in name]  # nothing private


def test_it_extends_trains_saves_loads_and_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minimal, "STEPS", 3)
    folder = tmp_path / "adapter"
    minimal.main(str(folder))
    assert "after 992 tokens of __future__.py it goes on: " in capsys.readouterr().out
    model = load(folder)
    assert context_length(model.get_base_model().config) == 1024
    assert context_length(AutoConfig.from_pretrained(minimal.MODEL)) == 256
    lora = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert lora and all(weight.any() for weight in lora)  # they begin as zeros
    with pytest.raises(SystemExit, match="adapter exists, and nothing is overwritten"):
        minimal.main(str(folder))
