"""A run whose loss is no number ends, and says so (examples/training/stop_at_nan.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import finetune_llama
from finetune_runs import make_model, make_text, small_run


def test_a_run_on_broken_weights_stops_and_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(SystemExit) as stopped:
        finetune_llama.main([*small_run(folder, text, tmp_path / "out"), "--eval_tokens", "0"])
    assert stopped.value.code == 2
    assert "the loss is nan at step 1: " in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter").exists()
