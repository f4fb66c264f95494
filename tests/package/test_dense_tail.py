"""Runs that end with dense attention (longlora_ext/trainer.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

import finetune_llama
from app.training import dense_tail
from finetune_runs import losses, make_model, make_text, small_run
from longlora_ext.trainer import DenseTail, dense_count
from tiny_models import tiny_model, tokens


@pytest.mark.parametrize(
    ("asked", "steps", "count"), [(0.1, 200, 20), (0.1, 5, 1), (0.07, 100, 7), (3, 200, 3), (200, 200, 200)]
)
def test_a_share_or_a_number_of_steps(asked: float, steps: int, count: int) -> None:
    assert dense_count(asked, steps) == count


@pytest.mark.parametrize("compiled", [False, True])
def test_the_step_says_which_attention(compiled: bool) -> None:
    """The mode is read in each forward pass, by a compiled model too: dense is what eval mode computes."""
    model = tiny_model().train()
    run = torch.compile(model, backend="eager") if compiled else model
    ids = tokens(1, 40)
    tail = DenseTail(model.config, 2)
    args, state, control = (
        TrainingArguments(use_cpu=True, report_to="none"),
        TrainerState(max_steps=4),
        TrainerControl(),
    )
    tail.on_train_begin(args, state, control)
    assert tail.first == 3
    outputs = []
    for step in range(4):
        state.global_step = step
        tail.on_step_begin(args, state, control)
        outputs.append(run(input_ids=ids, use_cache=False).logits)
        tail.on_step_end(args, state, control)
    grouped = run(input_ids=ids, use_cache=False).logits
    dense = model.eval()(input_ids=ids, use_cache=False).logits
    for output, expected in zip(outputs, (grouped, grouped, dense, dense), strict=True):
        torch.testing.assert_close(output, expected)
    assert (grouped - dense).abs().max() > 1e-3


def test_more_dense_steps_than_the_epochs_come_to_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    args = TrainingArguments(use_cpu=True, report_to="none")
    with pytest.raises(SystemExit):
        dense_tail.DenseTail(tiny_model().config, 5).on_train_begin(args, TrainerState(max_steps=4), TrainerControl())
    assert "--dense_steps 5 is more than the 4 steps that there are" in capsys.readouterr().err


def test_a_trainer_of_ones_own_is_told() -> None:
    config, args = tiny_model().config, TrainingArguments(use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="5 dense steps are more than the 4 steps that there are"):
        DenseTail(config, 5).on_train_begin(args, TrainerState(max_steps=4), TrainerControl())
    for share in (0, -1, 1.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"or a whole number, but they are {share}"):
            DenseTail(config, share)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_model(folder / "model"), make_text(folder / "text.jsonl")


def test_the_last_steps_of_a_run_are_dense_also_when_it_goes_on(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint of step 4, in the middle of the dense steps 4 to 6, which a longer run would not have."""
    finetune_llama.main([*small_run(*inputs, tmp_path / "grouped"), "--eval_tokens", "0"])
    dense = [*small_run(*inputs, tmp_path / "dense"), "--eval_tokens", "0", "--dense_steps", "0.5"]
    finetune_llama.main(dense)
    assert "dense attention from step 4 of 6 on" in capsys.readouterr().out
    grouped, whole = losses(tmp_path / "grouped"), losses(tmp_path / "dense")
    assert [whole[step] == grouped[step] for step in range(1, 7)] == [True] * 3 + [False] * 3
    assert json.loads((tmp_path / "dense" / "adapter" / "longlora.json").read_text())["config"]["s2attn_mode"] == "auto"

    shutil.rmtree(tmp_path / "dense" / "checkpoint-6")
    shutil.rmtree(tmp_path / "dense" / "adapter")
    dense += ["--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit):
        finetune_llama.main([*dense, "--max_steps", "8"])
    assert "max_steps was 6 and is 8" in capsys.readouterr().err
    finetune_llama.main(dense)
    assert "going on from checkpoint-4" in capsys.readouterr().out
    assert losses(tmp_path / "dense") == whole
