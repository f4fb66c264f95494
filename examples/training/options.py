"""The options of `finetune_llama.py` that transformers' `TrainingArguments` has not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from runs.command_line import TINY_LLAMA


@dataclass
class ModelOptions:
    """The model and its new context."""

    _argument_group_name = "model and context"

    model_name_or_path: str = field(
        default=str(TINY_LLAMA),
        metadata={"help": "Model to extend: a folder or a hub name."},
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "The GGUF file to load, where the model is a folder that holds one."}
    )
    context_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of the new context, and of a training sequence. Default: four times the model's."},
    )
    rope_type: str = field(
        default="linear",
        metadata={"help": f"How positions are scaled to the new context: default, {', '.join(ROPE_INIT_FUNCTIONS)}."},
    )
    rope_parameters: str | None = field(
        default=None,
        metadata={"help": "Further parameters of that RoPE type, as JSON: '{\"beta_fast\": 32}'."},
    )
    group_ratio: float | None = field(
        default=None,
        metadata={"help": "Tokens of an attention group as a share of the context. Default: 0.25."},
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of an attention group, instead of --group_ratio. Even; twice the context makes one group "
            "of it, for --window alone."
        },
    )
    sink: bool = field(
        default=False,
        metadata={"help": "Let each token see the first one of its document too, on which pretrained models rest."},
    )
    window: int | None = field(
        default=None, metadata={"help": "The tokens of its group that a token sees at most. Default: all before it."}
    )
    dense_steps: float = field(
        default=0.0,
        metadata={
            "help": "End the training with steps of dense attention: below 1 a share of all steps (0.1), from 1 on "
            "their number."
        },
    )
    full_finetune: bool = field(
        default=False, metadata={"help": "Train all weights, the paper's baseline, instead of an adapter."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Keep the weights that do not train in 4 bits (QLoRA, by the package bitsandbytes)."},
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Processes that share each sequence, for a context too long for one GPU (DeepSpeed's Ulysses). "
            "It must divide their number, the context, and the model's heads."
        },
    )


class TrainingOptions(TrainingArguments):
    """transformers' own, under a heading of their own."""

    _argument_group_name = "training (transformers' TrainingArguments)"


@dataclass
class DataOptions:
    """The text."""

    _argument_group_name = "text"

    task: Literal["text", "sft"] = field(
        default="text",
        metadata={
            "help": "What to learn: text, or sft, the answers in conversations (supervised fine-tuning). For sft the "
            'rows of --train_file are {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]} or '
            '{"instruction": ..., "output": ...} with or without "input"; they are written with the model\'s chat '
            "template or, where it has none, that of Llama 2."
        },
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text to train on: files (.txt .md .rst .py: a document each; .jsonl .json .parquet: "
            "a document a row; text and JSON may be packed, .gz), folders, glob patterns, or hub datasets "
            "OWNER/NAME[:CONFIG[:SPLIT]]. Default: Python's standard library."
        },
    )
    eval_file: list[str] | None = field(
        default=None,
        metadata={"help": "Text to measure on, given likewise. Default: every 20th document is held out."},
    )
    text_column: str = field(
        default="text", metadata={"help": "Column that holds the text of JSON, Parquet and hub datasets."}
    )
    rows: Literal["packed", "padded"] = field(
        default="packed",
        metadata={
            "help": "packed: several documents, or whole samples of --task sft, share a row of the new context, apart "
            "from each other. padded: each has rows of its own, as in the original; for models with layers that would "
            "mix the documents of a row (Mamba, linear attention, convolution), which are refused otherwise."
        },
    )
    eval_tokens: int = field(
        default=65536,
        metadata={"help": "Held-out tokens to measure perplexity on, before and after; 0: do not."},
    )
