"""Which options of `finetune_llama.py` are refused, before any model or text is looked at."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from app.inputs.sources import read_source, read_sources
from app.models.four_bits import check_bitsandbytes
from app.runs.command_line import EXAMPLES, check_not_empty, is_given
from app.runs.errors import one_clear_error
from app.runs.json_files import json_object, json_option
from app.runs.launch import WORLD_SIZE
from app.training.fsdp import check_fsdp


def check_options(parser: argparse.ArgumentParser, argv: Sequence[str], options: argparse.Namespace) -> None:
    """Refuse what is wrong by itself, whatever the model and the text are.

    Args:
        parser: Says what is wrong, and ends the program.
        argv: What was typed.
        options: What `parser` made of it.
    """
    if not options.model_name_or_path:
        parser.error("--model_name_or_path is empty")
    for name in ("train_file", "eval_file", "output_dir", "resume_from_checkpoint"):
        check_not_empty(parser, name, getattr(options, name))
    _check_idle(parser, argv, options)
    _check_numbers(parser, options)
    _check_text(parser, options)
    if options.rope_parameters is not None:
        try:
            json_object(options.rope_parameters)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--rope_parameters {error}")
    if options.resume_from_checkpoint == "latest" and options.output_dir is None:
        parser.error("--resume_from_checkpoint latest needs the --output_dir of the run to go on with")
    if isinstance(options.deepspeed, str):
        _check_deepspeed(parser, options.deepspeed)
    check_fsdp(parser, options)
    _check_sequence_parallel(parser, options)
    _check_trackers(parser, options)
    if options.load_in_4bit:
        _check_4bit(parser, options)
    if options.use_liger_kernel:
        _check_liger(parser)


def _check_idle(parser: argparse.ArgumentParser, argv: Sequence[str], options: argparse.Namespace) -> None:
    """Options that would do nothing, as another one says otherwise."""
    if options.group_ratio is not None and options.group_size is not None:
        parser.error("--group_ratio and --group_size say the same thing: give one of them")
    for option in ("lora_r", "lora_alpha"):
        if options.full_finetune and is_given(argv, option):
            parser.error(f"--{option} has no effect with --full_finetune, which trains no adapter")
    if options.task != "text" and is_given(argv, "text_column"):
        parser.error(f"--text_column has no effect with --task {options.task}")


def _check_numbers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.context_length is not None and options.context_length < 2:
        parser.error(f"--context_length must be 2 or more, got {options.context_length}")
    if options.group_ratio is not None and not 0 < options.group_ratio <= 1:
        parser.error(f"--group_ratio must be above 0 and at most 1, got {options.group_ratio}")
    if options.group_size is not None and (options.group_size < 2 or options.group_size % 2):
        parser.error(f"--group_size must be even and at least 2, got {options.group_size}")
    if options.window is not None and options.window < 1:
        parser.error(f"--window must be 1 or more, got {options.window}")
    if not (0 <= options.dense_steps < 1 or (options.dense_steps >= 1 and options.dense_steps % 1 == 0)):
        parser.error(
            "--dense_steps must be a share of the steps, from 0 to below 1, or a whole number, got "
            f"{options.dense_steps}"
        )
    if 0 < options.max_steps < options.dense_steps:
        parser.error(f"--dense_steps {options.dense_steps:g} is more than the {options.max_steps} steps there are")
    for option in (
        "lora_r",
        "lora_alpha",
        "gradient_accumulation_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
    ):
        if getattr(options, option) < 1:
            parser.error(f"--{option} must be 1 or more, got {getattr(options, option)}")
    if options.eval_tokens is not None and options.eval_tokens < 0:
        parser.error(f"--eval_tokens must be 0 or more, got {options.eval_tokens}")
    if not options.learning_rate > 0:
        parser.error(f"--learning_rate must be above 0, got {options.learning_rate}")
    for option in ("weight_decay", "adam_epsilon", "warmup_steps"):
        if not getattr(options, option) >= 0:
            parser.error(f"--{option} must be 0 or more, got {getattr(options, option)}")
    for option in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(options, option) < 1:
            parser.error(f"--{option} must be at least 0 and below 1, got {getattr(options, option)}")
    for option, value in vars(options).items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{option} must be finite, got {value}")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed must be at least 0 and below 2^32, got {options.seed}")
    if options.max_steps == 0:  # which transformers takes for one step
        parser.error("--max_steps must be above 0, or -1 for as many as --num_train_epochs takes, got 0")
    if options.max_steps < 0 and options.num_train_epochs <= 0:
        parser.error("nothing to train: give --max_steps or --num_train_epochs above 0")


def _check_text(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.eval_file is not None and options.train_file is None:
        parser.error("--eval_file needs --train_file")
    if options.task == "sft" and options.train_file is None:
        parser.error(
            "--task sft needs --train_file with questions and answers; examples/data/questions.jsonl is one to try"
        )
    _check_choice(parser, options)


def _check_choice(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Which of the text is trained on."""
    with one_clear_error("--train_file "):
        read_sources(options.train_file or [])
    if weighted := [word for word in options.eval_file or [] if read_source(word).weight is not None]:
        parser.error(
            f"--eval_file {weighted[0]} has a weight; weights are for --train_file, and this is measured whole"
        )
    least, most = options.min_document_tokens, options.max_document_tokens
    for option, tokens in (("min_document_tokens", least), ("max_document_tokens", most)):
        if tokens is not None and tokens < 1:
            parser.error(f"--{option} must be 1 or more, got {tokens}")
    if least is not None and most is not None and least > most:
        parser.error(f"--min_document_tokens {least} is more than --max_document_tokens {most}: no document is left")


def _check_sequence_parallel(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    size = options.sequence_parallel_size
    option = f"--sequence_parallel_size {size}"
    if size < 1:
        parser.error(f"--sequence_parallel_size must be 1 or more, got {size}")
    if size == 1:
        if options.sequence_parallel != "auto":
            parser.error(f"--sequence_parallel {options.sequence_parallel} needs --sequence_parallel_size above 1")
        return
    if options.check_retrieval:
        parser.error(f"{option} does not go with --check_retrieval, whose prompts no process shares")
    if WORLD_SIZE % size:
        parser.error(f"{option} does not divide the number of processes, {WORLD_SIZE}")


def _check_trackers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    installed = get_available_reporting_integrations()
    if options.report_to not in ("all", "none", *installed):
        parser.error(
            f"--report_to {options.report_to}: transformers knows no such tracker, or its package is not installed; "
            f"installed are {', '.join(installed) or 'none'}. pip install '.[tracking]' brings tensorboard and trackio"
        )


def _check_4bit(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    with one_clear_error():
        check_bitsandbytes()
    if options.full_finetune:
        parser.error("--load_in_4bit is for frozen weights, and --full_finetune trains all")
    if options.deepspeed and json_option("deepspeed", options.deepspeed).get("zero_optimization", {}).get("stage") == 3:
        parser.error("--load_in_4bit does not work with ZeRO-3, which shards the weights: use ds_configs/zero2.json")


def _check_liger(parser: argparse.ArgumentParser) -> None:
    missing = [] if torch.cuda.is_available() else ["a GPU"]
    if not is_liger_kernel_available():
        missing.append("the package liger-kernel (pip install '.[liger]')")
    if missing:
        parser.error(
            f"--use_liger_kernel needs {' and '.join(missing)}; without it the loss is computed in tiles, on any device"
        )


def _check_deepspeed(parser: argparse.ArgumentParser, config: str) -> None:
    if not config.startswith("{") and not Path(config).is_file():
        parser.error(f"--deepspeed {config}: no such file; ours are in {EXAMPLES / 'ds_configs'}")
    try:
        json_option("deepspeed", config)
    except ValueError as error:
        parser.error(str(error))
