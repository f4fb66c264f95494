"""A run whose loss is no number ends, and says so (examples/app/training/stop_at_nan.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer

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


@pytest.mark.parametrize("broken", ["loss", "grad_norm"])
def test_no_checkpoint_of_broken_weights(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is logged otherwise, a loss or a gradient that is no number is seen before weights are saved."""
    log = Trainer.log

    def break_from_third_step_on(trainer: Trainer, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        log(trainer, logs | ({broken: float("nan")} if trainer.state.global_step > 2 else {}), *args, **kwargs)

    monkeypatch.setattr(Trainer, "log", break_from_third_step_on)
    folder, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    with pytest.raises(SystemExit) as stopped:
        given = small_run(folder, text, tmp_path / "out", steps=8)
        finetune_llama.main([*given, "--logging_steps", "100", "--eval_tokens", "0"])
    assert stopped.value.code == 2
    what = {"loss": "loss", "grad_norm": "gradient"}[broken]
    assert f"the {what} is nan at step 4: " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
