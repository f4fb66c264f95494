"""Runs that go on with other options than they began with, from another place, or when they are over."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import finetune_llama
from finetune_runs import make_model, make_text, small_run

GO_ON = ["--resume_from_checkpoint", "latest"]


@pytest.fixture
def begun(alone: None, tmp_path: Path) -> list[str]:
    """Arguments of a run in the present folder, without its steps."""
    make_model(tmp_path / "model")
    make_text(tmp_path / "text.jsonl")
    words = small_run(Path("../model"), Path("../text.jsonl"), Path("out"))
    place = words.index("--max_steps")
    (tmp_path / "here").mkdir()
    return [*words[:place], *words[place + 2 :]]


@pytest.fixture(autouse=True)
def here(begun: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "here")


def changed(words: list[str], **options: object) -> list[str]:
    """The same with other values."""
    words = [*words]
    for name, value in options.items():
        if f"--{name}" in words:
            words[words.index(f"--{name}") + 1] = str(value)
        else:
            words += [f"--{name}", str(value)]
    return words


def history(checkpoint: str) -> list[dict[str, Any]]:
    return json.loads(Path(checkpoint, "trainer_state.json").read_text())["log_history"]


def test_how_often_it_saves_logs_and_evaluates_is_what_the_second_call_says(begun: list[str]) -> None:
    """The Trainer takes over the numbers of the checkpoint, and said so in a warning that named both."""
    finetune_llama.main(changed(begun, max_steps=2, eval_tokens=0))
    more = {"save_total_limit": 9, "save_steps": 1, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 3}
    finetune_llama.main([*changed(begun, max_steps=6, eval_tokens=0, **more), *GO_ON])
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in range(2, 7)]
    log = history("out/checkpoint-6")
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [3, 6]


def test_the_best_checkpoint_is_found_where_the_run_lies_now(begun: list[str], tmp_path: Path, monkeypatch) -> None:
    """From another folder its path led nowhere: the last weights were saved for the best, which were deleted."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "max_grad_norm": 0}
    words = changed(begun, max_steps=4, eval_tokens=0, learning_rate=0.3, load_best_model_at_end="true", **best)
    finetune_llama.main(words)
    kept = json.loads(Path("out/checkpoint-4/trainer_state.json").read_text())["best_global_step"]
    assert kept != 4, "the last step is the best: the test would show nothing"
    shutil.rmtree("out/adapter")  # as killed before the end
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    finetune_llama.main([*changed(words, output_dir="../here/out"), *GO_ON])
    best_weights, last, found = (
        load_file(f"../here/out/{folder}/adapter_model.safetensors")
        for folder in (f"checkpoint-{kept}", "checkpoint-4", "adapter")
    )
    assert all(weight.equal(found[name]) for name, weight in best_weights.items())
    assert not all(weight.equal(found[name]) for name, weight in last.items())


@pytest.mark.parametrize("option", [{"dense_steps": 2}, {"dataloader_drop_last": "true"}])
def test_a_run_by_passes_that_is_over_ends_again_as_it_did(option: dict[str, object], begun: list[str]) -> None:
    """The Trainer was told of one sequence: then two dense steps were more than there were, or it was no batch."""
    words = changed(begun, num_train_epochs=1, eval_tokens=0, **option)
    finetune_llama.main(words)
    outcome = json.loads(Path("out/run.json").read_text())["outcome"]
    shutil.rmtree("out/adapter")
    finetune_llama.main([*words, *GO_ON])
    assert json.loads(Path("out/run.json").read_text())["outcome"] == outcome


def test_that_a_longer_run_has_another_learning_rate_is_said(begun: list[str], capsys) -> None:
    def said() -> list[str]:
        return re.findall("note: the run .*number: .*", capsys.readouterr().out)

    words = changed(begun, eval_tokens=0, lr_scheduler_type="linear")
    finetune_llama.main(changed(words, max_steps=2))
    assert not said()
    finetune_llama.main([*changed(words, max_steps=4), *GO_ON])
    (note,) = said()
    assert "was to have 2 steps, and its learning rate (linear) depends on their number: one of 4 from its" in note
    finetune_llama.main(["--from_manifest", "out/run.json", "--output_dir", "again"])
    (note,) = said()
    assert "that is done again had 2 steps at first" in note
    constant = changed(begun, eval_tokens=0, output_dir="constant")
    finetune_llama.main(changed(constant, max_steps=2))
    finetune_llama.main([*changed(constant, max_steps=4), *GO_ON])
    assert not said()
