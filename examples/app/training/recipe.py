"""The recipes of `finetune_llama.py`: for a model of one's own, the paper's, and for the tiny Llama."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

#: What transformers calls this option from 5.23 on, and what before.
CHECKPOINTING_NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in CHECKPOINTING_NAMES if hasattr(TrainingArguments, name))

#: How RoPE is scaled where nothing else is asked and the model's is not scaled yet. It leaves high frequencies as they
#: are, so that few steps are enough; linear scaling, the paper's, changes all.
ROPE_TYPE = "yarn"

#: For a model of one's own: steps and learning rate of the LongLoRA paper, and what was found to keep retrieval
#: (docs/extend.md). The global batch of 64 sequences is made up by accumulation.
RECIPE: dict[str, Any] = {
    "sink": True,
    "max_steps": 1000,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    CHECKPOINTING: True,
    f"{CHECKPOINTING}_kwargs": '{"use_reentrant": false}',
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # it shows a loss of 0 where there is none: `StopAtNaN` looks at it
    "save_steps": 100,
    "save_total_limit": 2,
}
GLOBAL_BATCH = 64

#: The most that a run of few steps gets: of two rates the one at which pass keys stayed likelier (docs/extend.md).
HIGHEST_RATE = 2e-4


def for_steps(steps: int) -> dict[str, Any]:
    """Learning rate and warmup of `RECIPE` in a run of `steps`, which may be fewer than the paper's.

    AdamW moves a weight by about the learning rate in each step: in fewer steps it gets as far at a higher rate.
    """
    rate = RECIPE["learning_rate"] * max(1, RECIPE["max_steps"] / steps)
    return {"learning_rate": min(HIGHEST_RATE, rate), "warmup_steps": min(RECIPE["warmup_steps"], steps // 8)}


def by_steps(recipe: dict[str, Any], full_finetune: bool) -> tuple[str, ...]:
    """What of a recipe is as `for_steps` says."""
    if recipe is TINY_RECIPE:
        return ()
    return ("learning_rate", "warmup_steps") if recipe is RECIPE and not full_finetune else ("warmup_steps",)


def accumulation(at_once: int) -> int:
    """How many times `at_once` sequences make a step of `GLOBAL_BATCH`, or of the most below it."""
    return max(1, GLOBAL_BATCH // max(1, at_once))


#: What is different where answers are learned (`--task sft`).
SFT_RECIPE: dict[str, Any] = RECIPE | {"max_steps": -1, "num_train_epochs": 5}

#: `--recipe paper`: the paper's, and what it says of attention and adapter too, whatever the defaults of those are.
PAPER_RECIPE: dict[str, Any] = RECIPE | {
    "rope_type": "linear",
    "group_ratio": None,  # a quarter of the context
    "sink": False,
    "window": None,
    "dense_layers": None,
    "dense_steps": 0.0,
    "lora_r": 8,
    "lora_alpha": 16,
}

#: What is different for the tiny Llama, so that it is done in minutes on two CPU cores.
TINY_RECIPE: dict[str, Any] = RECIPE | {
    "rope_type": "linear",
    "sink": False,
    "max_steps": 200,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    CHECKPOINTING: False,
    "save_steps": 100,
    "eval_tokens": 12288,
}


def recipe_of(model: str | None, task: str | None, named: str | None) -> dict[str, Any]:
    """The defaults of a run.

    Args:
        model: The model that is asked for; None: the tiny Llama.
        task: `--task`.
        named: `--recipe`.
    """
    if named == "paper":
        answers = {name: value for name, value in SFT_RECIPE.items() if RECIPE.get(name) != value}
        return PAPER_RECIPE | (answers if task == "sft" else {})
    return TINY_RECIPE if model is None else SFT_RECIPE if task == "sft" else RECIPE
