"""The options of `finetune_llama.py` that transformers' `TrainingArguments` has not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from app.models.source import GGUF_HELP
from app.runs.command_line import TINY_LLAMA
from longlora_ext._rope import ROPE_TYPES

#: Held-out tokens that are measured, unless the new context is longer.
EVAL_TOKENS = 65536


@dataclass
class ModelOptions:
    """The model and its new context."""

    _argument_group_name = "model and context"

    model_name_or_path: str = field(
        default=str(TINY_LLAMA),
        metadata={"help": "Model to extend: a folder, a hub name or a GGUF file."},
    )
    gguf_file: str | None = field(default=None, metadata={"help": GGUF_HELP})
    context_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of the new context, and of a training sequence. Default: four times the model's."},
    )
    present_context_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the model's context. Needed only if its config is ambiguous, which is reported as an "
            "error: RoPE is scaled linearly, and max_position_embeddings may be the length before or after scaling."
        },
    )
    rope_type: str | None = field(
        default=None,
        metadata={
            "help": f"How positions are scaled to the new context: {', '.join(ROPE_TYPES)}. ntk is a larger rope_theta "
            "and no scaling. Without it: as the model's are already, or else yarn; linear with --recipe paper and for "
            "the tiny Llama."
        },
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
        metadata={
            "help": "Let each token see the first one of its document too, on which pretrained models rest "
            "(--sink false: do not)."
        },
    )
    window: int | None = field(
        default=None, metadata={"help": "The tokens of its group that a token sees at most. Default: all before it."}
    )
    dense_layers: str | None = field(
        default=None,
        metadata={
            "help": "Layers that attend densely in training too: how many of the last ones (3), or their indices from "
            "0, with commas (0,5,29 or 5,)."
        },
    )
    dense_steps: float = field(
        default=0.0,
        metadata={
            "help": "Use dense attention in the last steps: below 1 a share of all steps (0.1), from 1 on a number of "
            "steps."
        },
    )
    recipe: Literal["paper"] | None = field(
        default=None,
        metadata={
            "help": "paper: the settings of the LongLoRA paper for all that is not given, whatever the model. Default: "
            "for a model of your own these, but for --sink, --rope_type yarn and the learning rate of fewer than 1000 "
            "steps; a smaller recipe for the tiny Llama."
        },
    )
    check_retrieval: bool = field(
        default=False,
        metadata={
            "help": "Ask for pass keys at the model's own context before training, with RoPE scaled only, and after "
            "it, and say at the end whether it still finds them."
        },
    )
    full_finetune: bool = field(
        default=False, metadata={"help": "Train all weights, the paper's baseline, instead of an adapter."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Keep the frozen weights in 4 bits (QLoRA, with the package bitsandbytes)."},
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Processes that share each sequence, for a context too long for one GPU. It must divide the "
            "number of processes."
        },
    )
    sequence_parallel: Literal["auto", "halo", "ulysses"] = field(
        default="auto",
        metadata={
            "help": "How these attend to what the others hold. halo: neighbours send what the groups of S2-Attn reach. "
            "ulysses: all exchange tokens for heads, which they must divide. auto: halo for S2-Attn, ulysses for dense "
            "attention, wherever that is possible."
        },
    )


@dataclass
class TrainingOptions(TrainingArguments):
    """transformers' own, under a heading of their own.

    Attributes:
        by_steps: Names of options whose defaults depend on the steps, where only the text will tell how many these are.
    """

    _argument_group_name = "training (transformers' TrainingArguments)"

    by_steps: tuple[str, ...] = field(default=(), init=False)


@dataclass
class DataOptions:
    """The text."""

    _argument_group_name = "text"

    task: Literal["text", "sft"] = field(
        default="text",
        metadata={
            "help": "What to learn: text, or sft, the answers in conversations (supervised fine-tuning). For sft the "
            'rows of --train_file are {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}, '
            '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]} or {"instruction": ..., '
            '"output": ...}; docs/instruct.md lists all fields. They are written with the model\'s chat template '
            "or, if it has none, with Llama 2's."
        },
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text to train on: files (.txt .md .rst .py: one document each; .jsonl .json .parquet: "
            "one document per row; also compressed as .gz or .zst), folders, glob patterns, or hub datasets "
            "OWNER/NAME[:CONFIG[:SPLIT]]. Default: Python's standard library. With weights, books/:0.7 chat.jsonl:0.3, "
            "each has that share of the tokens: the one with the fewest tokens for its weight is used whole, and whole "
            "documents of the others, chosen by --seed, fill their shares. None is repeated."
        },
    )
    min_document_tokens: int | None = field(
        default=None,
        metadata={"help": "Leave out documents of --train_file with fewer tokens, before weights are applied."},
    )
    max_document_tokens: int | None = field(
        default=None, metadata={"help": "Leave out documents of --train_file with more tokens."}
    )
    eval_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text to evaluate on, in the same forms. Default: every 20th document is held out, or the end of a "
            "large one."
        },
    )
    text_column: str = field(
        default="text", metadata={"help": "Column that holds the text of JSON, Parquet and hub datasets."}
    )
    rows: Literal["packed", "padded"] = field(
        default="packed",
        metadata={
            "help": "packed: several documents, or whole samples of --task sft, share a row of the new context without "
            "attending to each other. padded: each has rows of its own, as in the original. Models with layers that "
            "mix the documents of a row (Mamba, linear attention, convolution) need padded."
        },
    )
    eval_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Held-out tokens to measure perplexity on, before and after training; 0: none. Without it: "
            f"{EVAL_TOKENS}, or as many as the new context if that is more; 12288 for the tiny Llama."
        },
    )
