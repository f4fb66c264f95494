"""A plan to read."""

from __future__ import annotations

from typing import Any

from app.planning.calibration import rate_lines
from app.planning.communication import sent_lines
from app.planning.planner import MOST
from app.runs.wording import counted
from app.training.recipe import accumulation


def table(found: dict[str, Any]) -> str:
    """The figures to read."""
    run, parameters, context = found["run"], found["parameters"], found["context"]
    zero = f"ZeRO-{run['zero']}{' with offload' if run['offload'] else ''}" if run["zero"] else "no ZeRO"
    trained = "all weights" if run["full_finetune"] else f"LoRA r={run['lora_r']}, embedding and norms"
    memory, total = found["memory"], found["total"]
    own, sharing = found["model_context"], run["sequence_parallel_size"]
    at_once = run["gpus"] * run["batch"] // sharing
    batch = f"batch {run['batch']} a GPU" if sharing == 1 else f"batch {run['batch']} for {sharing} GPUs together"
    packed = f", {parameters['in_4_bits']:,} of these in 4 bits" if run["load_in_4bit"] else ""
    step = at_once * accumulation(at_once)
    tokens = f"{own:,} -> {context:,} tokens" if context > own else f"{context:,} tokens, the model's own"
    lines = [
        f"{found['model']}: {tokens}, {counted(run['gpus'], 'GPU')}, {zero}, {batch}, bf16, {trained}",
        f"parameters: {parameters['trainable']:,} trained ({parameters['lora']:,} of LoRA), "
        f"{parameters['frozen']:,} frozen{packed}",
        f"attention: {found['attention']} in training",
        "",
        f"{'GB on each GPU':<32}" + "".join(f"{name:>16}" for name in memory),
    ]

    def row(name: str, values: list[str]) -> str:
        return f"{name:<32}" + "".join(f"{value:>16}" for value in values)

    for part in memory["default"]:
        lines.append(row(part, [f"{memory[name][part] / 1e9:,.2f}" for name in memory]))
    lines.append(row("together", [f"{total[name] / 1e9:,.2f}" for name in memory]))
    fits = ["yes" if total[name] <= found["gpu_memory"] else "no" for name in memory]
    lines.append(row(f"fits in {found['gpu_memory'] / 1e9:g} GB", fits))
    lines.append(row("longest context that fits", [_tokens(found["longest_context"][name]) for name in memory]))
    if run["offload"]:
        lines.append(f"in the host's memory: {found['host_memory'] * run['gpus'] / 1e9:,.1f} GB")
    if "sent" in found:
        lines += ["", *sent_lines(found["sent"], found["link"])]
    s2, dense = found["flops_of_a_sequence"]["s2"], found["flops_of_a_sequence"]["dense"]
    lines += ["", f"{'TFLOP, forward and backward':<32}{'S2-Attn':>16}{'dense':>16}{'dense / S2':>16}"]
    for name, what, scale in (
        ("attention of a sequence", "attention", 1e12),
        ("all of a sequence", "all", 1e12),
        ("of a token", "all", 1e12 * context),
        (f"of a step of {counted(step, 'sequence')}", "all", 1e12 / step),
    ):
        values = [f"{flops[what] / scale:,.4g}" for flops in (s2, dense)]
        lines.append(row(name, [*values, f"{dense[what] / s2[what]:.2f}"]))
    if "rate" in found:
        lines += ["", *rate_lines(found)]
    lines += [
        "",
        "default: activation checkpointing (all but a layer's input is computed again) and the loss in tiles, as",
        "finetune_llama.py does. Attention counts the pairs attended to, half of the square for dense. Gradients are",
        "counted as if all were there in the backward pass. No GPU has confirmed these figures yet.",
    ]
    return "\n".join(lines)


def _tokens(longest: int) -> str:
    return f"{longest:,}" if 0 < longest < MOST else "none" if longest == 0 else f"over {MOST:,}"
