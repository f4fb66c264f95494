"""finetune_llama.py where processes share sequences: killed and resumed, for answers, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from app.training import checks
from finetune_runs import ROOT, losses, make_model, make_text, run, small_run
from longlora_ext.adapter import merge
from same_run import assert_same_run

ZERO_2 = ("--deepspeed", str(ROOT / "examples" / "ds_configs" / "zero2.json"))


def make_questions(path: Path) -> Path:
    """Samples of unlike lengths, so that rows of a batch are filled up and two do not divide them."""
    rows = [{"instruction": f"What is {n} times {n}?", "output": f"It is {n * n}." * (1 + n % 3)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.full
@pytest.mark.parametrize(
    ("task", "by", "rows", "sharding"),
    [
        ("text", "halo", "packed", ZERO_2),
        ("text", "ulysses", "packed", ("--fsdp", "full_shard")),
        ("sft", "halo", "packed", ()),
        ("sft", "ulysses", "padded", ZERO_2),
    ],
)
def test_it_trains_as_one_and_goes_on(task: str, by: str, rows: str, sharding: tuple[str, ...], tmp_path: Path) -> None:
    text = make_text(tmp_path / "text.jsonl") if task == "text" else make_questions(tmp_path / "questions.jsonl")
    model = make_model(tmp_path / "model")

    def arguments(name: str) -> list[str]:
        return [*small_run(model, text, tmp_path / name, steps=4), "--task", task, "--rows", rows]

    shared = ["--sequence_parallel_size", "2", "--sequence_parallel", by, *sharding]
    alone = run(*arguments("alone"))
    assert alone.returncode == 0, alone.stdout + alone.stderr
    whole = run(*arguments("whole"), *shared, processes=2)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    for gone in (*stopped.glob("adapter*"), stopped / "checkpoint-4"):
        shutil.rmtree(gone)
    resumed = run(*arguments("stopped"), *shared, "--resume_from_checkpoint", "latest", processes=2)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_same_run(tmp_path / "whole", stopped)
    merge(stopped / "adapter", tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").max_position_embeddings == 128


def test_processes_that_share_a_sequence_are_one_for_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes that share by two have as many sequences at a time as two that do not."""
    monkeypatch.setattr(checks, "WORLD_SIZE", 4)
    args: Any = SimpleNamespace(per_device_train_batch_size=3, dataloader_drop_last=True, eval_strategy="no")
    data: Any = SimpleNamespace(rows=range(6), train=SimpleNamespace(check_rows=lambda rows: None))
    options: Any = SimpleNamespace(sequence_parallel_size=2)
    checks.check_training(args, data, options)
    data.rows = range(5)
    with pytest.raises(ValueError, match="5 sequences are no batch of 6"):
        checks.check_training(args, data, options)
