"""What can be asked of `finetune_llama.py` on the command line, and what it does when nothing is asked.

Options that transformers has (`TrainingArguments`: learning rate, batch, steps, logging, DeepSpeed, ...)
are taken as they are; here are only those it has not, and the defaults: the paper's recipe for any model
you name, and a small one for the tiny Llama that ships with the project.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import is_liger_kernel_available

from models.four_bits import check_bitsandbytes
from runs.command_line import EXAMPLES, TINY_LLAMA, HelpFormatter, Parser, one_clear_error
from runs.launch import USE_CONFIGURED_STATE, WORLD_SIZE, by_deepspeed, fail, prepare_deepspeed
from training.ulysses import parallelism

#: transformers renamed this option in 5.23.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)

#: The recipe of the LongLoRA paper. Its global batch of 64 sequences is made up by accumulation.
RECIPE: dict[str, Any] = {
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
    "eval_tokens": 65536,
}
GLOBAL_BATCH = 64


def accumulation(at_once: int) -> int:
    """How many times `at_once` sequences make a step of `GLOBAL_BATCH`, or of the most below it."""
    return max(1, GLOBAL_BATCH // max(1, at_once))


#: What is different where answers are learned (`--task sft`).
SFT_RECIPE: dict[str, Any] = RECIPE | {"max_steps": -1, "num_train_epochs": 5}

#: What is different for the tiny Llama, so that it is done in minutes on two CPU cores.
TINY_RECIPE: dict[str, Any] = RECIPE | {
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

DESCRIPTION = """\
Extend the context of a Llama-like model with shifted short attention (LongLoRA).

Without arguments it extends the tiny Llama that ships with the project fourfold, on the text of Python's
standard library, and shows what that changed; a few minutes on two CPU cores. Started by `deepspeed`, it
trains under ZeRO-2 unless --deepspeed names another configuration (examples/ds_configs/: zero2, zero3,
zero3_offload).

Below are all options: first this program's own, then those of transformers' TrainingArguments, then examples. The
defaults are those for the tiny Llama; with --model_name_or_path MODEL, --help shows those for a model of your own.
"""

#: What options of TrainingArguments mean here, where its own text says something else, or not enough.
HELP = {
    "output_dir": "Folder to write. Default: finetuned/MODEL-CONTEXT, with a number after it where there is one "
    "already. A folder that holds something is never written to, but to go on with its run.",
    "resume_from_checkpoint": "latest: go on from the newest complete checkpoint in --output_dir, or begin where there "
    "is none. Or the folder of a checkpoint.",
    "deepspeed": "DeepSpeed's configuration, a JSON file. Default: examples/ds_configs/zero2.json if deepspeed starts "
    "the program, else none.",
    "use_cpu": "Train on the CPU. Default: where there is no GPU.",
    "do_train": argparse.SUPPRESS,  # these three are for scripts that look at them
    "do_eval": argparse.SUPPRESS,
    "do_predict": argparse.SUPPRESS,
}
ACCUMULATION_HELP = f"Batches that make a step together. Default: what makes {GLOBAL_BATCH} sequences."

EXAMPLE_COMMANDS = """\
examples:
  see it work, no download, no GPU:
    deepspeed examples/finetune_llama.py

  a model and a text of your own, to four times the model's context:
    deepspeed examples/finetune_llama.py --model_name_or_path my/llama --train_file books/

  to 32768 tokens under ZeRO-3, YaRN instead of linear scaling, attention in groups of 4096:
    deepspeed examples/finetune_llama.py --model_name_or_path my/llama --train_file 'data/*.jsonl' \\
        --context_length 32768 --rope_type yarn --group_size 4096 --deepspeed examples/ds_configs/zero3.json

  to answer questions (LongAlpaca's JSON, or JSON Lines of chat messages), with the loss on the answers alone:
    deepspeed examples/finetune_llama.py --task sft --train_file examples/data/questions.jsonl --max_steps 12

  do a run again, the very same: its arguments are in run.json, and so is this command
    deepspeed examples/finetune_llama.py --from_manifest finetuned/llama-32768/run.json

  with less memory: activations in the host's, frozen weights in 4 bits; or sequences shared by two GPUs each
    ... --activation_checkpointing_kwargs '{"use_reentrant": false, "offload": true}' --load_in_4bit
    ... --deepspeed examples/ds_configs/zero3.json --sequence_parallel_size 2

  go on after an interruption: the same command again, with the same --output_dir, and
    --resume_from_checkpoint latest

the output folder (default: finetuned/MODEL-CONTEXT) holds adapter/ (what was trained), perplexity.txt and .json,
loss.png, checkpoint-*/ and run.json (what made it: arguments, text, versions); if there is one of that name already,
a number is added to it
"""


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
        default=None, metadata={"help": "Tokens of an attention group, instead of --group_ratio. Even."}
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
            "a document a row), folders, glob patterns, or hub datasets OWNER/NAME[:CONFIG[:SPLIT]]. "
            "Default: Python's standard library."
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
            "help": "For sft: packed puts several whole samples into a row of the new context, apart from each other; "
            "padded takes one sample a row, as the original did."
        },
    )
    eval_tokens: int = field(
        default=65536,
        metadata={"help": "Held-out tokens to measure perplexity on, before and after; 0: do not."},
    )


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """The dtype to compute in, and that of the weights that are not trained."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def parse(argv: Sequence[str]) -> tuple[ModelOptions, DataOptions, TrainingArguments]:
    """Read the command line, on every process alike.

    Args:
        argv: The arguments, without the program's name.

    Returns:
        The options with their defaults filled in, and checked as far as that goes without looking at model
        and text. `TrainingArguments` brings the process group up.

    Raises:
        SystemExit: On a mistake, after saying what it is; and after --help.
    """
    kinds: Any = (ModelOptions, DataOptions, TrainingOptions)
    parser = Parser(
        kinds,
        prog="finetune_llama.py",
        usage="deepspeed examples/finetune_llama.py [OPTIONS]   (or python, or torchrun, in place of deepspeed)",
        description=DESCRIPTION,
        epilog=EXAMPLE_COMMANDS,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(  # read by `manifest.repeated`, before
        "--from_manifest",
        metavar="RUN_JSON",
        default=argparse.SUPPRESS,
        help="Do the run again that wrote this run.json. It stops if it would be another one: other text or settings.",
    )
    probe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    probe.add_argument("--model_name_or_path", "--model-name-or-path")
    probe.add_argument("--task")
    probed = probe.parse_known_args(argv)[0]
    named = probed.model_name_or_path
    recipe = TINY_RECIPE if named is None else SFT_RECIPE if probed.task == "sft" else RECIPE
    parser.set_defaults(**recipe, **_machine_defaults())
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
        if action.dest == "gradient_accumulation_steps" and named is not None:
            action.help = ACCUMULATION_HELP

    asked, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown argument: {' '.join(unknown)}")
    if _is_given(argv, "num_train_epochs") and not _is_given(argv, "max_steps"):
        parser.set_defaults(max_steps=-1)
    if named is not None and not _is_given(argv, "gradient_accumulation_steps"):
        batch = asked.per_device_train_batch_size * WORLD_SIZE // max(1, asked.sequence_parallel_size)
        parser.set_defaults(gradient_accumulation_steps=accumulation(batch))
    if asked.fp16 and not _is_given(argv, "bf16"):
        parser.set_defaults(bf16=False)
    if not asked.deepspeed and not torch.accelerator.is_available():
        # Or accelerate brings no process group up, and each of several processes takes itself for the only one.
        parser.set_defaults(use_cpu=True)
    if asked.use_liger_kernel:
        _check_liger(parser)
    for option in ("lora_r", "lora_alpha"):
        if asked.full_finetune and _is_given(argv, option):
            parser.error(f"--{option} says nothing with --full_finetune, which trains no adapter")
    if asked.output_dir is None:
        parser.set_defaults(output_dir="")  # named after model and context, later
    for option, task in (("rows", "sft"), ("text_column", "text")):
        if asked.task != task and _is_given(argv, option):
            parser.error(f"--{option} says nothing with --task {asked.task}")
    _check(parser, asked)
    _check_sequence_parallel(parser, asked)
    if asked.load_in_4bit:
        _check_4bit(parser, asked)

    with one_clear_error():
        if asked.deepspeed:
            prepare_deepspeed()
            parser.set_defaults(accelerator_config=USE_CONFIGURED_STATE)
        model, data, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        if model.sequence_parallel_size > 1:
            training.parallelism_config = parallelism(model.sequence_parallel_size)
    if training.n_gpu > 1:
        fail(
            f"one process sees {training.n_gpu} GPUs: start it with deepspeed to use them all, or set "
            "CUDA_VISIBLE_DEVICES=0 to use one"
        )
    if (getattr(training, f"{CHECKPOINTING}_kwargs") or {}).get("offload") and not torch.accelerator.is_available():
        fail(f'--{CHECKPOINTING}_kwargs "offload" needs a GPU: on a CPU activations are in host memory already')
    if os.path.isdir(model.model_name_or_path):
        model.model_name_or_path = os.path.abspath(model.model_name_or_path)
    return model, data, training


def _machine_defaults() -> dict[str, Any]:
    """Defaults that depend on what the program runs on and how it was started."""
    gpu = torch.cuda.is_available()
    defaults = {
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": gpu,
        "ddp_find_unused_parameters": False,  # all that is trained is used in every step
        "ddp_timeout": 6 * 3600,  # seconds that the others wait while the first process tokenises a large text
    }
    if by_deepspeed():
        defaults["deepspeed"] = str(EXAMPLES / "ds_configs" / "zero2.json")
    return defaults


def _is_given(argv: Sequence[str], option: str) -> bool:
    spellings = {f"--{option}", f"--{option.replace('_', '-')}"}
    return any(argument.split("=")[0] in spellings for argument in argv)


def _check(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    """Refuse what is wrong by itself, whatever the model and the text are."""
    if not asked.model_name_or_path:
        parser.error("--model_name_or_path is empty")
    if asked.context_length is not None and asked.context_length < 2:
        parser.error(f"--context_length must be 2 or more, got {asked.context_length}")
    if asked.group_ratio is not None and asked.group_size is not None:
        parser.error("--group_ratio and --group_size say the same thing: give one of them")
    if asked.group_ratio is not None and not 0 < asked.group_ratio <= 1:
        parser.error(f"--group_ratio must be above 0 and at most 1, got {asked.group_ratio}")
    if asked.group_size is not None and (asked.group_size < 2 or asked.group_size % 2):
        parser.error(f"--group_size must be even and at least 2, got {asked.group_size}")
    if not (0 <= asked.dense_steps < 1 or (asked.dense_steps >= 1 and asked.dense_steps % 1 == 0)):
        parser.error(
            f"--dense_steps must be a share of the steps, from 0 to below 1, or a whole number, got {asked.dense_steps}"
        )
    if 0 < asked.max_steps < asked.dense_steps:
        parser.error(f"--dense_steps {asked.dense_steps:g} is more than the {asked.max_steps} steps there are")
    for option in (
        "lora_r",
        "lora_alpha",
        "gradient_accumulation_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
    ):
        if getattr(asked, option) < 1:
            parser.error(f"--{option} must be 1 or more, got {getattr(asked, option)}")
    if asked.eval_tokens < 0:
        parser.error(f"--eval_tokens must be 0 or more, got {asked.eval_tokens}")
    if not asked.learning_rate > 0:
        parser.error(f"--learning_rate must be above 0, got {asked.learning_rate}")
    for option in ("weight_decay", "adam_epsilon", "warmup_steps"):
        if not getattr(asked, option) >= 0:
            parser.error(f"--{option} must be 0 or more, got {getattr(asked, option)}")
    for option in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(asked, option) < 1:
            parser.error(f"--{option} must be at least 0 and below 1, got {getattr(asked, option)}")
    for option, value in vars(asked).items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{option} must be finite, got {value}")
    if not 0 <= asked.seed < 2**32:
        parser.error(f"--seed must be at least 0 and below 2^32, got {asked.seed}")
    if asked.max_steps <= 0 and asked.num_train_epochs <= 0:
        parser.error("nothing to train: give --max_steps or --num_train_epochs above 0")
    if asked.eval_file is not None and asked.train_file is None:
        parser.error("--eval_file needs --train_file")
    if asked.task == "sft" and asked.train_file is None:
        parser.error(
            "--task sft needs --train_file with questions and answers; examples/data/questions.jsonl is one to try"
        )
    if asked.resume_from_checkpoint == "latest" and asked.output_dir is None:
        parser.error("--resume_from_checkpoint latest needs the --output_dir of the run to go on with")
    if asked.rope_parameters is not None:
        try:
            parsed = json.loads(asked.rope_parameters)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            parser.error(f"--rope_parameters must be a JSON object, got {asked.rope_parameters!r}")
    if isinstance(asked.deepspeed, str):
        _check_deepspeed(parser, asked.deepspeed)


def _check_sequence_parallel(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    size = asked.sequence_parallel_size
    option = f"--sequence_parallel_size {size}"
    if size < 1:
        parser.error(f"--sequence_parallel_size must be 1 or more, got {size}")
    if size == 1:
        return
    if not asked.deepspeed:
        parser.error(f"{option} needs DeepSpeed: start the program with deepspeed, or give --deepspeed")
    if WORLD_SIZE % size:
        parser.error(f"{option} does not divide the number of processes, {WORLD_SIZE}")
    if asked.task != "text":
        parser.error(f"{option} is for --task text, whose sequences all have one length")
    if asked.resume_from_checkpoint:
        parser.error(f"{option} cannot go on from a checkpoint: the Trainer cannot skip what its data loader has read")


def _check_4bit(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    with one_clear_error():
        check_bitsandbytes()
    if asked.full_finetune:
        parser.error("--load_in_4bit is for weights that do not train, and --full_finetune trains all")
    if asked.deepspeed and _read_deepspeed(asked.deepspeed).get("zero_optimization", {}).get("stage") == 3:
        parser.error("--load_in_4bit cannot be had with ZeRO-3, which cuts weights up: take ds_configs/zero2.json")


def _check_liger(parser: argparse.ArgumentParser) -> None:
    missing = [] if torch.cuda.is_available() else ["a GPU"]
    if not is_liger_kernel_available():
        missing.append("the package liger-kernel (pip install 'longlora-ext[liger]')")
    if missing:
        parser.error(
            f"--use_liger_kernel needs {' and '.join(missing)}; without it the loss is computed in tiles, on any device"
        )


def _check_deepspeed(parser: argparse.ArgumentParser, config: str) -> None:
    if not config.startswith("{") and not Path(config).is_file():
        parser.error(f"--deepspeed {config}: no such file; ours are in {EXAMPLES / 'ds_configs'}")
    try:
        parsed = _read_deepspeed(config)
    except ValueError as error:
        parser.error(f"--deepspeed {config}: no JSON: {error}")
    if not isinstance(parsed, dict):
        parser.error(f"--deepspeed {config}: no JSON object")


def _read_deepspeed(config: str) -> Any:
    return json.loads(config if config.startswith("{") else Path(config).read_text())
