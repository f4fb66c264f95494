"""What a run says: at its start what it is going to do, at its end what came of it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import torch
from transformers import PreTrainedConfig, TrainingArguments

from app.models.windows import layers_for_sink
from app.runs.command_line import EXAMPLES
from app.runs.launch import WORLD_SIZE
from app.runs.run import Run
from app.runs.wording import counted
from app.training.arguments import compute_dtype
from app.training.data import TrainingData
from app.training.measure import Measurement
from app.training.options import ModelOptions
from app.training.recipe import RECIPE, for_steps
from longlora_ext._pattern import dense_layers, in_words, sink
from longlora_ext.adapter._norms import norms_of
from longlora_ext.config import context_length
from longlora_ext.trainer import dense_count

#: Tokens for which the paper's learning rate may be too low: a tenth of its own.
FEW = 50_000_000


def banner(
    options: ModelOptions,
    args: TrainingArguments,
    steps: int,
    base_config: PreTrainedConfig,
    model: torch.nn.Module,
    data: TrainingData,
    run: Run,
) -> str:
    """What is about to be done, a line for each thing worth checking before waiting for it."""
    config: PreTrainedConfig = model.config  # type: ignore[assignment]
    old, new = context_length(base_config), context_length(config)
    rope = {key: value for key, value in config.rope_parameters.items() if key != "rope_theta"}
    weights = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trainable, total = sum(n for n, trained in weights if trained), sum(n for n, _ in weights)
    norms = "and norms" if norms_of(model) else "(its norms have no weights)"
    trained = "all weights" if options.full_finetune else f"LoRA r={options.lora_r}, embedding {norms}"
    shared = options.sequence_parallel_size
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * WORLD_SIZE // shared
    batch, short = min(batch, len(data.rows)), ", the whole text" if len(data.rows) < batch else ""
    counted_steps = counted(steps, "step") + ("" if args.max_steps > 0 else f" ({args.num_train_epochs:g} x the text)")
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[compute_dtype(args)]
    tail = ""
    if options.dense_steps:
        tail = f"dense in the last {counted(dense_count(options.dense_steps, steps), 'step')}, "
    sharding = "FSDP" if args.fsdp else "no DeepSpeed"
    if args.deepspeed_plugin:
        sharding = f"ZeRO-{args.deepspeed_plugin.zero_stage}"
    rows = {
        "model": f"{options.model_name_or_path} ({type(config).__name__.removesuffix('Config')})",
        "context": f"{old:,} -> {new:,} tokens" if new > old else f"{new:,} tokens, the model's own",
        "RoPE": ", ".join(f"{key}={value}" for key, value in rope.items()) if new > old else "as it is",
        "attention": f"{seen(config)} in training, {tail}dense in use",
        "training": f"{trained}: {trainable:,} of {total:,} weights, {dtype}",
        **data.train.describe(data.rows),
        **data.choice.describe(data.train.noun),
        "held out": held_out(data),
        "steps": f"{counted_steps}, {counted(batch, 'sequence')} in each{short}, {rate(args, steps, batch * new)}",
        "processes": f"{WORLD_SIZE}, {sharding}{f', {shared} for each sequence' if shared > 1 else ''}",
        "output": f"{run.folder}{f', going on from {run.checkpoint.name}' if run.checkpoint else ''}",
    }
    below = "\n" + " " * 11
    return "\n".join(["", *(f"{key + ':':<11}{value.replace(chr(10), below)}" for key, value in rows.items()), ""])


def held_out(data: TrainingData) -> str:
    """What is not trained on, but may be measured."""
    whole = counted(len(data.held_out.dataset), data.held_out.noun)
    return f"{whole} of {data.held_out.tokens:,} tokens" if data.held_out.tokens else "nothing"


def rate(args: TrainingArguments, steps: int, tokens_a_step: int) -> str:
    """The learning rate: where it is that of a short run, why; where it is the paper's and the tokens are few, what is
    known of that."""
    paper, tokens = RECIPE["learning_rate"], steps * tokens_a_step
    said = f"learning rate {args.learning_rate:g}"
    if steps < RECIPE["max_steps"] and args.learning_rate == for_steps(steps)["learning_rate"]:
        return f"{said}:\nthe paper's {paper:g} is for {RECIPE['max_steps']:,} steps, and these go further in each"
    if args.learning_rate == paper and tokens < FEW:
        return (
            f"{said}, the paper's for half a billion tokens;\n"
            f"these are {tokens:,}: docs/extend.md says what --learning_rate 2e-4 and 5e-4 did with 262,144"
        )
    return said


def seen(config: PreTrainedConfig) -> str:
    """What a token sees in training, in words."""
    groups = f"groups of {config.s2attn_group_size:,} tokens"
    if config.s2attn_group_size >= 2 * context_length(config):
        groups = "one group of all tokens"
    if (window := getattr(config, "s2attn_window", None)) is not None:
        groups += f", in them a window of {window:,}"
    if sink(config):
        layers, of_all = layers_for_sink(config), config.num_hidden_layers
        others = f" in {layers} of {of_all} layers (the others have windows)" if layers < of_all else ""
        groups += f", and the first token{others}"
    return groups + (f", dense in layers {in_words(dense)}" if (dense := dense_layers(config)) else "")


def results(folder: Path, adapter: Path, measurement: Measurement | None, full_finetune: bool) -> str:
    """What came of it, and the next commands to type."""
    lines = ["", measurement.table()] if measurement else [""]
    lines += [f"loss curve: {folder / 'loss.png'}", f"{adapter.name + ':':<12}{adapter}"]
    if not full_finetune:
        merged = str(folder / "merged")
        lines += [
            "",
            "next: see whether it finds what is hidden in a long text, ask it about a file, or make it a model folder",
            "that transformers loads without this project",
            _command("evaluate.py", "passkey", "--model", str(adapter)),
            _command("generate.py", "--model", str(adapter), "--file", "FILE", "--question", "QUESTION"),
            _command("merge_adapter.py", str(adapter), merged),
        ]
    return "\n".join(lines)


def _command(program: str, *words: str) -> str:
    path = str(EXAMPLES / program)
    return "    " + shlex.join(["python", min(path, os.path.relpath(path), key=len), *words])
