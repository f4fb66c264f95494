"""Texts and adapters to run examples/evaluate.py on, and the ways to run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import evaluate
from longlora_ext.adapter import lora_config, prepare_model, save_adapter
from longlora_ext.config import extend_config


def make_books(folder: Path) -> Path:
    """Texts: one shorter than the context of `make_model`, two longer ones, one four times as long."""
    for number, size in enumerate((20, 50, 70, 140)):
        (folder / f"{number}.txt").write_text("".join(chr(97 + (i * i + number) % 26) for i in range(size)))
    return folder


def make_adapter(model: Path, folder: Path, context: int) -> Path:
    """An adapter of a model to a longer context that changes what the model says, as training would."""
    config = extend_config(AutoConfig.from_pretrained(model), context)
    base = AutoModelForCausalLM.from_pretrained(model, config=config, attn_implementation="s2attn")
    trained = prepare_model(base, lora_config(base))
    torch.manual_seed(1)
    for name, weight in trained.named_parameters():
        if "lora_B" in name or ("norm" in name and weight.requires_grad):
            torch.nn.init.normal_(weight, std=0.5)
    save_adapter(trained, folder, AutoTokenizer.from_pretrained(model))
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
