"""The training of an arm by transformers' Trainer and our library, resumed where it was killed."""

from __future__ import annotations

import json
import random
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from app.runs.json_files import write_json
from app.runs.precision import machine_dtype
from extending.arms import Arm
from longlora_ext import lora_config, prepare_model
from longlora_ext.data import PackedSequences, pad_rows
from longlora_ext.loss import tile_loss
from longlora_ext.trainer import DenseTail

STATE = "trainer_state.json"
WARMUP = 2  # steps; after them the learning rate is constant, so that fewer steps are the beginning of more


@dataclass(frozen=True)
class Recipe:
    """What all arms have in common."""

    context: int
    steps: int
    learning_rate: float
    seed: int
    save_steps: int
    device: str


class StepTimes(TrainerCallback):
    """Seconds of each step, by the clock and of this process's own on its cores; kept in a file when resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, tuple[float, float]] = json.loads(path.read_text()) if path.exists() else {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Look at the clocks."""
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note what has passed."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        self.seconds[str(state.global_step)] = (now[0] - self.began[0], now[1] - self.began[1])
        write_json(self.path, self.seconds)


class Together(torch.utils.data.Dataset[list[dict[str, torch.Tensor]]]):
    """Rows that follow each other, so many in an item: as many items as rows of the whole context, and shuffled as they
    are with the same seed."""

    def __init__(self, rows: PackedSequences, count: int) -> None:
        self.rows, self.count = rows, count

    def __len__(self) -> int:
        return -(-len(self.rows) // self.count)

    def __getitem__(self, index: int) -> list[dict[str, torch.Tensor]]:
        first = index * self.count
        return [self.rows[i] for i in range(first, min(first + self.count, len(self.rows)))]


def pretrained(folder: str, config: PreTrainedConfig) -> Any:
    """The model of a folder with an arm's config, in the dtype that the machine computes in."""
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=machine_dtype(), attn_implementation="s2attn"
    )


def train(
    arm: Arm,
    folder: str,
    config: PreTrainedConfig,
    documents: list[list[int]],
    padding: int,
    recipe: Recipe,
    work: Path,
) -> tuple[Any, dict[str, Any]]:
    """Train the model of a folder, or go on from the last checkpoint in `work`.

    Returns:
        The trained model, and what it took: losses, gradient norms, seconds a step and peak memory.

    Raises:
        ValueError: The last checkpoint is of more steps.
    """
    set_seed(recipe.seed)
    is_gpu = recipe.device == "cuda"
    base = pretrained(folder, config)
    model = tile_loss(prepare_model(base, lora_config(base)))
    documents = list(documents)
    random.Random(f"order {recipe.seed}").shuffle(documents)
    rows = PackedSequences(documents, int(recipe.context * arm.row_share), padding)
    in_a_step = round(1 / arm.row_share)
    together = 1 if arm.drawn_alone else in_a_step
    args = TrainingArguments(
        output_dir=str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=in_a_step // together,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP,
        weight_decay=0.0,
        bf16=machine_dtype() == torch.bfloat16,
        use_cpu=not is_gpu,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        save_steps=recipe.save_steps,
        save_total_limit=1,
        seed=recipe.seed,
        report_to=[],
        dataloader_pin_memory=is_gpu,
        disable_tqdm=True,
    )
    times = StepTimes(work / "seconds.json")
    tail = [DenseTail(base.config, arm.dense_steps)] if arm.dense_steps else []
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Together(rows, together),
        data_collator=lambda items: pad_rows([row for item in items for row in item], pad_token_id=padding),
        callbacks=[times, *tail],
    )
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    check_steps(work, recipe.steps)
    done, last = _last_checkpoint(work)
    if last is not None and done == recipe.steps:  # of which the Trainer would do one step more
        set_peft_model_state_dict(model, load_file(last / "adapter_model.safetensors"))
        log = json.loads((last / STATE).read_text())["log_history"]
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        log = trainer.state.log_history
    history = [entry for entry in log if "grad_norm" in entry]
    return model, {
        "steps": recipe.steps,
        "learning_rate": recipe.learning_rate,
        "tokens": recipe.steps * in_a_step * rows.context_length,
        "loss": [entry["loss"] for entry in history],
        "gradient_norm": [entry["grad_norm"] for entry in history],
        **_cost(times, in_a_step * rows.context_length, is_gpu),
    }


def check_steps(work: Path, steps: int) -> None:
    """Raise `ValueError` if an arm is trained beyond these steps, of which nothing is left then."""
    done, _ = _last_checkpoint(work)
    if done > steps:
        raise ValueError(f"{work} is trained to step {done} and cannot be measured at {steps} any more")


def _last_checkpoint(work: Path) -> tuple[int, Path | None]:
    """The steps of the last one that is complete, and its folder: the Trainer writes the file of its state last."""
    whole: list[tuple[int, Path]] = []
    for path in work.glob(f"checkpoint-*/{STATE}"):
        try:
            whole.append((json.loads(path.read_text())["global_step"], path.parent))
        except (ValueError, KeyError):
            continue
    return max(whole, default=(0, None))


def _cost(times: StepTimes, tokens: int, is_gpu: bool) -> dict[str, Any]:
    """The median step, of which the first is left out where there are others, and the peak of memory."""
    by_step = [times.seconds[step] for step in sorted(times.seconds, key=int)]
    steady = by_step[1:] or by_step
    clock, own = (sorted(column)[len(steady) // 2] for column in zip(*steady, strict=True))
    peak = torch.cuda.max_memory_allocated() if is_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds_a_step": clock,
        "processor_seconds_a_step": own,
        "tokens_a_second": tokens / clock,
        "seconds_in_all": sum(seconds for seconds, _ in by_step),
        "peak_memory": peak,
    }
