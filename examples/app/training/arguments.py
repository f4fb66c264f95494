"""The command line of `finetune_llama.py`: its help, and its options with their defaults filled in."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
import transformers
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedModel, TrainingArguments

from app.models.source import find_model
from app.runs.command_line import EXAMPLES, HelpFormatter, Parser, is_given
from app.runs.errors import one_clear_error
from app.runs.launch import USE_CONFIGURED_STATE, WORLD_SIZE, by_deepspeed, fail, prepare_deepspeed, prepare_fsdp
from app.runs.precision import computes_in_bf16
from app.training.fsdp import FIELDS, compute_in, fsdp_config
from app.training.options import DataOptions, ModelOptions, TrainingOptions
from app.training.recipe import (
    CHECKPOINTING,
    CHECKPOINTING_NAMES,
    GLOBAL_BATCH,
    HIGHEST_RATE,
    accumulation,
    by_steps,
    for_steps,
    recipe_of,
)
from app.training.refusals import check_options
from app.training.steps import left_open

DESCRIPTION = """\
Extend the context of a Llama-like model with shifted short attention (LongLoRA).

Without arguments it extends the tiny Llama that ships with the project to four times its context, on the text
of Python's standard library, and shows what that changed. This takes a few minutes on two CPU cores. Under
`deepspeed` it trains with ZeRO-2, unless --deepspeed names another configuration (examples/ds_configs/: zero2,
zero3, zero3_offload). Without DeepSpeed, under `torchrun`, --fsdp full_shard does what ZeRO-3 does.

The options below are this program's own, then those of transformers' TrainingArguments; examples are at the end. The
defaults shown are for the tiny Llama; add --model_name_or_path MODEL to --help to see those for your model.
"""

#: What options of TrainingArguments mean here, where its own text says something else, or not enough.
HELP = {
    "output_dir": "Folder to write. Default: finetuned/MODEL-CONTEXT, with a number appended if that exists "
    "already. A folder that is not empty is an error, except to resume its run.",
    "resume_from_checkpoint": "latest: resume from the newest complete checkpoint in --output_dir, or start from the "
    "first step if there is none. Or the folder of a checkpoint.",
    "deepspeed": "DeepSpeed's configuration, a JSON file. Default: examples/ds_configs/zero2.json if deepspeed starts "
    "the program, else none.",
    "fsdp": "Shard the model over the processes by torch's FSDP, without DeepSpeed: full_shard; or shard_grad_op, that "
    'takes more memory and sends less; either with offload, to the host\'s memory ("full_shard offload"). Start the '
    "program with torchrun.",
    "fsdp_config": f"More about that, a JSON file or object with {', '.join(FIELDS)}. docs/gpus.md tells of them.",
    "learning_rate": "The learning rate once warmed up. Default: 2e-3 for the tiny Llama, else the paper's 2e-5. With "
    f"fewer than the paper's 1000 steps it is as many times higher, up to {HIGHEST_RATE:g}, but not with --task sft, "
    "--full_finetune or --recipe paper.",
    "use_cpu": "Train on the CPU. Default: only if there is no GPU.",
    "bf16": "Compute in bfloat16. Default: on a GPU that has it, and on a CPU that multiplies it (AVX512_BF16, AMX).",
    "do_train": argparse.SUPPRESS,  # these three are for scripts that look at them
    "do_eval": argparse.SUPPRESS,
    "do_predict": argparse.SUPPRESS,
}
ACCUMULATION_HELP = f"Batches accumulated in a step. Default: so many that a step has {GLOBAL_BATCH} sequences."

EXAMPLE_COMMANDS = """\
examples:
  see it work, no download, no GPU:
    deepspeed examples/finetune_llama.py

  a model and a text of your own, to four times the model's context:
    deepspeed examples/finetune_llama.py --model_name_or_path my/llama --train_file books/

  to 32768 tokens under ZeRO-3, attention in groups of 4096:
    deepspeed examples/finetune_llama.py --model_name_or_path my/llama --train_file 'data/*.jsonl' \\
        --context_length 32768 --group_size 4096 --deepspeed examples/ds_configs/zero3.json

  the same without DeepSpeed, on 8 GPUs
    torchrun --nproc_per_node 8 examples/finetune_llama.py --model_name_or_path my/llama --train_file 'data/*.jsonl' \\
        --context_length 32768 --group_size 4096 --fsdp full_shard

  to answer questions (LongAlpaca's JSON, or JSON Lines of chat messages), with the loss on the answers only:
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


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """The dtype to compute in, and that of the weights that are not trained."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def parse(argv: Sequence[str], typed: Sequence[str] | None = None) -> tuple[ModelOptions, DataOptions, TrainingOptions]:
    """Read the command line, on every process alike.

    Args:
        argv: The arguments, without the program's name.
        typed: Those that were typed, where others are those of an earlier run; default: all.

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
    )
    parser.typed = argv if typed is None else typed
    parser.add_argument(  # read by `manifest.repeated`, before
        "--from_manifest",
        metavar="RUN_JSON",
        default=argparse.SUPPRESS,
        help="Repeat the run that wrote this run.json. It is an error if the text or a setting has changed.",
    )
    probe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    probe.add_argument("--model_name_or_path", "--model-name-or-path")
    probe.add_argument("--task")
    probe.add_argument("--recipe")
    probed = probe.parse_known_args(argv)[0]
    named = probed.model_name_or_path
    _take_both_names(parser)
    recipe = recipe_of(named, probed.task, probed.recipe)
    parser.set_defaults(**recipe, **_machine_defaults())
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
        if action.dest == "gradient_accumulation_steps" and named is not None:
            action.help = ACCUMULATION_HELP
        if action.dest == "resume_from_checkpoint":
            action.type = _checkpoint

    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown argument: {' '.join(unknown)}")
    if is_given(argv, "num_train_epochs") and not is_given(argv, "max_steps"):
        parser.set_defaults(max_steps=-1)
        options.max_steps = -1
    fitting = by_steps(recipe, options.full_finetune)
    if options.max_steps > 0:
        parser.set_defaults(**{name: for_steps(options.max_steps)[name] for name in fitting})
    if (named or options.recipe) and not is_given(argv, "gradient_accumulation_steps"):
        batch = options.per_device_train_batch_size * WORLD_SIZE // max(1, options.sequence_parallel_size)
        parser.set_defaults(gradient_accumulation_steps=accumulation(batch))
    if options.fp16 and not is_given(argv, "bf16"):
        parser.set_defaults(bf16=False)
        options.bf16 = False
    if (options.bf16 or not options.deepspeed) and not torch.accelerator.is_available():
        # Without it transformers refuses bf16, and without DeepSpeed accelerate brings no process group up: each of
        # several processes takes itself for the only one.
        parser.set_defaults(use_cpu=True)
    if options.output_dir is None:
        parser.set_defaults(output_dir="")  # named after model and context, later
    check_options(parser, argv, options)

    with one_clear_error():
        if options.deepspeed:
            prepare_deepspeed()
            parser.set_defaults(accelerator_config=USE_CONFIGURED_STATE)
        if options.fsdp:
            argv = [*argv, *_prepare_fsdp(parser, options)]
        model, data, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if training.max_steps <= 0:
        training.by_steps = left_open(fitting, argv, training)
    if training.fsdp:
        compute_in(training, compute_dtype(training))
    if training.n_gpu > 1:
        fail(
            f"one process sees {training.n_gpu} GPUs: start it with deepspeed to use them all, or set "
            "CUDA_VISIBLE_DEVICES=0 to use one"
        )
    if (getattr(training, f"{CHECKPOINTING}_kwargs") or {}).get("offload"):
        _check_offload()
    with one_clear_error(f"--model_name_or_path {model.model_name_or_path}: "):
        model.model_name_or_path, model.gguf_file = find_model(model.model_name_or_path, model.gguf_file)
    if os.path.isdir(model.model_name_or_path):
        model.model_name_or_path = os.path.abspath(model.model_name_or_path)
    return model, data, training


def _checkpoint(given: str) -> str:
    """Where to resume from, in which the Trainer says `true` for the newest checkpoint."""
    return "latest" if given in ("true", "True") else given


def _prepare_fsdp(parser: Parser, options: argparse.Namespace) -> list[str]:
    """Get ready for FSDP; returns arguments for the Trainer that take the place of those that were given."""
    config = fsdp_config(options)
    on_cpu = bool(options.use_cpu) or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    prepare_fsdp(on_cpu, load_once=config["cpu_ram_efficient_loading"])
    parser.set_defaults(
        # Or each process holds the gradients of all weights until the last batch of a step.
        accelerator_config={
            "use_configured_state": on_cpu,
            "gradient_accumulation_kwargs": {"sync_each_batch": True},
        },
        # What is offloaded to the host is added up there.
        ddp_backend="cuda:nccl,cpu:gloo" if config["cpu_offload"] else None,
    )
    # It advises FSDP's own activation checkpointing, in whose layers PEFT finds no adapter to save.
    logging.getLogger("transformers.training_args").setLevel(logging.ERROR)
    return ["--fsdp", "--fsdp_config", json.dumps(config)]


def _check_offload() -> None:
    option = f'--{CHECKPOINTING}_kwargs "offload"'
    if not torch.accelerator.is_available():
        fail(f"{option} needs a GPU: on a CPU activations are in host memory already")
    if "offload" not in signature(getattr(PreTrainedModel, f"{CHECKPOINTING}_enable")).parameters:
        fail(f"{option} needs a newer transformers than {transformers.__version__}")


def _take_both_names(parser: Parser) -> None:
    """Let activation checkpointing be asked for by its current name and by its former one, which says the same.

    Where transformers has both, it takes no notice of the former if the current one has a value, as in our recipes.
    """
    options = parser._option_string_actions
    for suffix in ("", "_kwargs"):
        action = options[f"--{CHECKPOINTING}{suffix}"]
        for name in CHECKPOINTING_NAMES:
            option = f"--{name}{suffix}"
            if options.get(option, action) is not action:
                options[option].help = argparse.SUPPRESS
            options[option] = options[option.replace("_", "-")] = action


def _machine_defaults() -> dict[str, Any]:
    """Defaults that depend on what the program runs on and how it was started."""
    gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "bf16": computes_in_bf16(),
        "dataloader_pin_memory": gpu,
        "ddp_find_unused_parameters": False,  # all that is trained is used in every step
        "ddp_timeout": 6 * 3600,  # seconds that the others wait while the first process tokenises a large text
    }
    if by_deepspeed():
        defaults["deepspeed"] = str(EXAMPLES / "ds_configs" / "zero2.json")
    return defaults
