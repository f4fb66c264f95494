"""Time of a whole training step of a model of Llama 3 8B's shape, with S2-Attn and with dense attention.

    python benchmarks/step_time.py                                      # on a GPU: all layers, 16k to 100k tokens
    python benchmarks/step_time.py --layers 4 --seqlen 16384 65536      # as many layers as there is time for
    python benchmarks/step_time.py --ways s2_sink flash --output step_time.json

A step is forward, backward and AdamW of one sequence, as `finetune_llama.py` does it: LoRA, trained embedding and
norms, bfloat16, activation checkpointing, tiled loss. Weights and tokens are random, and the learning rate is 0: so all
ways compute with the same model, and the dense ones arrive at the same loss. The ways take turns, and the median is
reported; the peak of memory includes the weights. With fewer layers, embedding, loss and AdamW weigh more than in the
whole model, and nothing is extrapolated. On a CPU the model is tiny: that shows that the program works, and nothing
else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

import longlora_ext.attention  # noqa: F401  (registers attn_implementation="s2attn")
from clock import Clock
from environment import environment
from longlora_ext import extend_config, lora_config, prepare_model
from longlora_ext.loss import tile_loss
from table import row, source

SHAPES: dict[str, dict[str, Any]] = {
    "cuda": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "cpu": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 32,
    },
}  # fmt: skip
SEQLEN = {"cuda": [16384, 32768, 65536, 102400], "cpu": [64, 128]}
BOTH = ("cuda", "cpu")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Way:
    """How a model attends in training."""

    says: str
    implementation: str
    fields: dict[str, Any] = field(default_factory=dict)  # of the model's config
    backend: SDPBackend | None = None
    devices: tuple[str, ...] = BOTH


#: The first is what the others are compared with.
WAYS = {
    "s2_sink": Way("S2-Attn and the first token", "s2attn", {"s2attn_mode": "s2", "s2attn_sink": True}),
    "s2": Way("S2-Attn as published", "s2attn", {"s2attn_mode": "s2", "s2attn_sink": False}),
    "dense": Way("dense, ours", "s2attn", {"s2attn_mode": "dense"}),
    "sdpa": Way("dense SDPA", "sdpa", devices=("cpu",)),
    "flash": Way("dense, flash", "sdpa", backend=SDPBackend.FLASH_ATTENTION, devices=("cuda",)),
    "cudnn": Way("dense, cuDNN", "sdpa", backend=SDPBackend.CUDNN_ATTENTION, devices=("cuda",)),
}
OURS = [name for name, way in WAYS.items() if way.implementation == "s2attn"]


def made_model(shape: dict[str, Any], context: int, device: str) -> Any:
    """A model with random weights, made where it is used, and ready to train for a context."""
    config = extend_config(LlamaConfig(**shape), context, rope_type="yarn", sink=True)
    with torch.device(device):
        base: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="s2attn")
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model: Any = prepare_model(base, lora_config(base))
    return tile_loss(model.to(device)).train()


def attend_by(way: Way, model: Any, seqlen: int) -> None:
    """Let a model attend so from now on, in groups of a quarter of the sequence where there are groups."""
    base = model.get_base_model()
    base.set_attn_implementation(way.implementation)
    for name, value in {**way.fields, "s2attn_group_size": seqlen // 8 * 2}.items():
        setattr(base.config, name, value)


def measure(model: Any, names: Sequence[str], seqlen: int, steps: int, device: str, clock: Clock) -> dict[str, Any]:
    """Median, least and most seconds of a step for each way, its peak of memory and loss, or why there are none."""
    ids = torch.randint(model.config.vocab_size, (1, seqlen), device=device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=device == "cuda")

    def step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    results: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in names}
    for turn in range(steps + 1):  # the first is what is done once, and not counted
        for name, found in results.items():
            if "reason" in found:
                continue
            attend_by(WAYS[name], model, seqlen)
            reason = timed(step, WAYS[name], found, device, clock, keep=turn > 0)
            if reason is not None:
                results[name] = {"reason": reason}
                optimizer.zero_grad()
                if device == "cuda":
                    torch.cuda.empty_cache()
    for found in results.values():
        if seconds := found.get("seconds"):
            median = statistics.median(seconds)
            found |= {"median": median, "least": min(seconds), "most": max(seconds), "tokens_a_second": seqlen / median}
    return {"seqlen": seqlen, "group_size": seqlen // 8 * 2, "results": results}


def timed(
    step: Callable[[], torch.Tensor], way: Way, found: dict[str, Any], device: str, clock: Clock, keep: bool
) -> str | None:
    """Note what a step took, or return why it failed, which leaves nothing of it in memory."""
    try:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with sdpa_kernel(way.backend) if way.backend else nullcontext():
            loss, elapsed = clock.time(step)
            clock.wait()
        found["loss"] = loss.item()
        if keep:
            found["seconds"].append(elapsed() / 1000)
            found["peak_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else None
    except RuntimeError as error:  # such as a backend that this GPU does not have
        return OUT_OF_MEMORY if OUT_OF_MEMORY in str(error).lower() else str(error).partition("\n")[0]
    return None


def table(run: dict[str, Any]) -> str:
    """A row for each length and way."""
    head = ["tokens", "", "s a step", "multiple", "tokens a s", "peak GiB", "loss"]
    lines = [row(head), "|---" * len(head) + "|"]
    for point in run["points"]:
        first = next(iter(point["results"].values())).get("median")
        for name, found in point["results"].items():
            cells = [f"{point['seqlen']:,}", WAYS[name].says]
            if "reason" in found:
                lines.append(row([*cells, found["reason"], *[""] * (len(head) - 3)]))
                continue
            peak = f"{found['peak_bytes'] / 2**30:.1f}" if found["peak_bytes"] else "-"
            ratio = f"{found['median'] / first:.2f}x" if first else "-"
            speed = f"{found['tokens_a_second']:,.0f}"
            lines.append(row([*cells, f"{found['median']:.3g}", ratio, speed, peak, f"{found['loss']:.3f}"]))
    layers = f"{run['layers']} of the {run['layers_of_the_shape']} layers"
    said = f"{layers} of a model of width {run['shape']['hidden_size']}, {run['parameters'] / 1e6:,.1f} million "
    said += f"parameters; median of {run['steps']} steps; groups of a quarter of the sequence"
    return "\n".join([f"{said}.", "", *lines, "", source(run)])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, with what depends on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=BOTH, default=here, help="where to measure (here: %(default)s)")
    add("--layers", type=int, help="of the model (32; 2 on a CPU)")
    add("--seqlen", type=int, nargs="+", help="tokens of the sequence (16384 32768 65536 102400; 64 128 on a CPU)")
    add("--steps", type=int, default=5, help="of each way at each length, after one that is not counted (%(default)s)")
    add("--ways", nargs="+", choices=list(WAYS), help="what to compare (all that the device has)")
    add("--output", type=Path, help="JSON file for the results, written after each length")
    add("--note", help="what a reader of the figures must know, such as that the machine was shared")
    options = parser.parse_args(arguments)
    options.layers = options.layers or SHAPES[options.device]["num_hidden_layers"]
    options.seqlen = sorted(options.seqlen or SEQLEN[options.device])
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """All lengths, the shortest first, so that an interrupted run leaves whole ones."""
    options = parse(arguments)
    torch.manual_seed(0)
    shape = SHAPES[options.device] | {"num_hidden_layers": options.layers}
    names = [name for name in WAYS if name in (options.ways or WAYS) and options.device in WAYS[name].devices]
    model, clock = made_model(shape, options.seqlen[-1], options.device), Clock(options.device)
    run: dict[str, Any] = {
        "environment": environment(options.device, options.note),
        "shape": shape,
        "layers": options.layers,
        "layers_of_the_shape": SHAPES[options.device]["num_hidden_layers"],
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "steps": options.steps,
        "points": [],
    }
    for seqlen in options.seqlen:
        run["points"].append(measure(model, names, seqlen, options.steps, options.device, clock))
        if options.output:
            options.output.write_text(json.dumps(run, indent=1) + "\n")
        print(f"measured {seqlen:,} tokens", file=sys.stderr, flush=True)
    print(table(run))
    ours = [point["results"][name].get("reason") for point in run["points"] for name in names if name in OURS]
    if failed := {*ours} - {None, OUT_OF_MEMORY}:
        sys.exit(f"ours did not run: {', '.join(map(str, failed))}")


if __name__ == "__main__":
    main()
