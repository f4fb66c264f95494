#!/usr/bin/env python
"""Plan a fine-tuning run before anything is loaded: memory of each GPU, compute, the longest context.

    python examples/plan.py --model meta-llama/Llama-2-7b-hf --context 32768 --gpus 8 --zero 3

Only the model's config is read. No weights are allocated: layers run on the meta device, and their memory and compute
are counted. The plan is for what finetune_llama.py does: bf16, LoRA with trained embedding and norms under DeepSpeed,
activation checkpointing, and a tiled loss. The other columns are without one of the last two.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import app.runs.launch  # noqa: F401  isort: skip  (must come first: sets variables that libraries read at import)
from transformers import PreTrainedConfig

from app.models.source import GGUF_HELP
from app.models.suitable import check_attention, check_context
from app.planning.calibration import measure_rate
from app.planning.communication import LINK, context_table, sending
from app.planning.planner import Plan, PlannedRun, Way
from app.planning.presets import PRESETS, read_config
from app.planning.report import table
from app.runs.command_line import Parser, as_program
from app.runs.errors import one_clear_error
from app.training.dense_layers import asked_layers
from app.training.report import seen
from app.training.shared_sequences import check_sharing
from longlora_ext.config import context_length, rope_type_of, settle_context

WAYS = {
    "default": Way(),
    "whole logits": Way(tiled_loss=False),
    "no checkpoints": Way(checkpointing=False),
}


UNITS = {"gb": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20}
MOST_MEMORY = 2000  # GB that somebody may mean
MOST_BATCH = 4096  # sequences, whose tiles of logits are gone through one by one


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python examples/plan.py --model MODEL [OPTIONS]",
    )
    parser.add_argument(
        "--model",
        required=True,
        help=f"a folder, a hub name, a GGUF file, a config.json, or one that is known here: {', '.join(PRESETS)}",
    )
    parser.add_argument("--gguf_file", help=GGUF_HELP)
    parser.add_argument("--context", type=int, help="tokens of a sequence (default: four times the model's)")
    parser.add_argument(
        "--present_context_length",
        type=int,
        metavar="TOKENS",
        help="tokens of the model's context; needed only if its config is ambiguous, as for finetune_llama.py",
    )
    parser.add_argument("--gpus", type=int, default=1, help="total number of GPUs (default: 1)")
    parser.add_argument("--zero", type=int, choices=range(4), help="stage of ZeRO; 0 is none (default: 2)")
    parser.add_argument("--offload", action="store_true", help="ZeRO-3 with weights and optimizer in host memory")
    parser.add_argument("--batch", type=int, default=1, help="sequences on a GPU at a time (default: 1)")
    parser.add_argument("--full_finetune", action="store_true", help="train all weights")
    parser.add_argument("--lora_r", type=int, help="rank of the adapter (default: 8)")
    parser.add_argument("--load_in_4bit", action="store_true", help="frozen weights in 4 bits")
    parser.add_argument(
        "--sequence_parallel_size", type=int, default=1, metavar="GPUS", help="GPUs that share a sequence (default: 1)"
    )
    parser.add_argument("--group_size", type=int, metavar="TOKENS", help="tokens of a group (default: a quarter)")
    parser.add_argument("--sink", action="store_true", help="each token sees the first one of its document too")
    parser.add_argument(
        "--window", type=int, metavar="TOKENS", help="the tokens of its group that a token sees at most"
    )
    parser.add_argument("--dense_layers", help="layers that are dense in training too, as for finetune_llama.py")
    parser.add_argument(
        "--sequence_parallel",
        choices=("auto", "halo", "ulysses"),
        default="auto",
        help="how these attend to what the others hold, as for finetune_llama.py (default: auto)",
    )
    parser.add_argument(
        "--link",
        type=float,
        default=LINK,
        metavar="GB/S",
        help=f"what a GPU sends in a second, assumed, for the time that sharing takes (default: {LINK:g})",
    )
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="print a table of these contexts instead: what the GPUs that share a sequence send and hold",
    )
    parser.add_argument(
        "--gpu_memory",
        type=gigabytes,
        default=80,
        metavar="GB",
        help="memory of one GPU (default: 80); with a unit also as nvidia-smi prints it: 24564MiB",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure the rate of this machine, in about half a minute, and print tokens a second and hours as well",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers, in bytes and operations, as JSON")
    options = parser.parse_args(argv)
    numbers = ("context", "gpus", "lora_r", "sequence_parallel_size", "group_size", "window")
    if not 0 < options.batch <= MOST_BATCH:
        parser.error(f"--batch must be from 1 to {MOST_BATCH:,}, got {options.batch}")
    for name in (*numbers, "link"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1e9:
            parser.error(f"--{name} must be above 0 and below a billion, got {value}")
    if options.offload and options.zero not in (None, 3):
        parser.error("--offload goes with --zero 3 (examples/ds_configs/zero3_offload.json)")
    if options.full_finetune and options.lora_r is not None:
        parser.error("--lora_r has no effect with --full_finetune, which trains no adapter")
    options.zero = 3 if options.offload else 2 if options.zero is None else options.zero
    if options.load_in_4bit and (options.full_finetune or options.zero == 3):
        parser.error("--load_in_4bit is for frozen weights that ZeRO-3 does not shard")
    if options.gpus % options.sequence_parallel_size:
        parser.error(f"--sequence_parallel_size {options.sequence_parallel_size} does not divide --gpus {options.gpus}")
    if options.sequence_parallel_size == 1 and (options.contexts or options.sequence_parallel != "auto"):
        parser.error("--contexts and --sequence_parallel are about --sequence_parallel_size above 1")
    for name in ("context", "calibrate", "json"):
        if options.contexts and getattr(options, name):
            parser.error(f"--{name} has no effect with --contexts, which prints a table of its own")
    options.lora_r = options.lora_r or 8
    try:
        options.dense_layers = asked_layers(options.dense_layers)
    except ValueError as error:
        parser.error(str(error))
    return options


def gigabytes(text: str) -> float:
    """What `--gpu_memory` says, in GB. Of a number alone no GPU has more than a few hundred."""
    said = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)?", text.strip(), re.IGNORECASE)
    number = float(said[1]) if said else 0
    if not said or number == 0:
        raise argparse.ArgumentTypeError(f"must be a number of GB, or one with a unit such as 24564MiB, got {text!r}")
    if not said[2] and number > MOST_MEMORY:
        raise argparse.ArgumentTypeError(
            f"is in GB, and no GPU has {text} of them: nvidia-smi's MiB are {text}MiB here"
        )
    return number * UNITS[(said[2] or "gb").lower()] / 1e9


def base_config(options: argparse.Namespace) -> PreTrainedConfig:
    """The config of the model, which says how many tokens it reads now."""
    return settle_context(read_config(options.model, options.gguf_file), options.present_context_length)


def run_of(options: argparse.Namespace) -> PlannedRun:
    """How the model is trained."""
    return PlannedRun(
        zero=options.zero,
        offload=options.offload,
        gpus=options.gpus,
        batch=options.batch,
        full_finetune=options.full_finetune,
        lora_r=options.lora_r,
        load_in_4bit=options.load_in_4bit,
        sequence_parallel_size=options.sequence_parallel_size,
        group_size=options.group_size,
        sink=options.sink,
        window=options.window,
        dense_layers=options.dense_layers,
        sequence_parallel=options.sequence_parallel,
    )


def figures(options: argparse.Namespace) -> dict[str, Any]:
    """All that is printed, in bytes, operations and tokens."""
    config = base_config(options)
    check_attention(config, options.context)
    own = context_length(config)
    needs_factors = rope_type_of(config) == "longrope"  # which no plan is given
    context = options.context or (own if needs_factors else 4 * own)
    check_context("--context", context, own)
    if needs_factors and context > own:
        raise ValueError(
            f"rope_type 'longrope' needs factors for a longer context: plan it at --context {own}, its own"
        )
    if (options.group_size or 0) > 2 * context:
        raise ValueError(f"--group_size {options.group_size} is more than twice the context of {context}")
    check_sharing(config, options.sequence_parallel_size, options.sequence_parallel)
    run = run_of(options)
    plan = Plan(config, context, run)
    memory, available = {name: plan.memory(way) for name, way in WAYS.items()}, int(options.gpu_memory * 1e9)
    return {
        "model": options.model,
        "context": context,
        "model_context": own,
        "attention": seen(plan.config),
        "run": {name: value for name, value in asdict(run).items() if name not in ("dtype", "scratch")},
        "parameters": plan.parameters,
        "memory": memory,
        "total": {name: sum(parts.values()) for name, parts in memory.items()},
        "host_memory": plan.host_memory(),
        "gpu_memory": available,
        "longest_context": {name: plan.longest(way, available) for name, way in WAYS.items()},
        **({"rate": asdict(measure_rate(plan))} if options.calibrate else {}),
        **({"sent": sending(plan), "link": options.link * 1e9} if run.sequence_parallel_size > 1 else {}),
        "flops_of_a_sequence": {"s2": plan.flops(), "dense": plan.flops(dense=True)},
    }


def contexts(options: argparse.Namespace) -> str:
    """The table of `--contexts`."""
    config = base_config(options)
    check_sharing(config, options.sequence_parallel_size, options.sequence_parallel)
    link, memory = options.link * 1e9, options.gpu_memory * 1e9
    return context_table(config, run_of(options), options.contexts, link, memory)


@as_program("plan.py")
def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    with one_clear_error(f"--model {options.model}: "):
        if options.contexts:
            print(contexts(options))
            return
        found = figures(options)
    print(json.dumps(found, indent=2) if options.json else table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
