"""What a step of a small model takes on a CPU, as its allocator saw it: the measure of the planner.

    torchrun --nproc_per_node 2 tests/helpers/measured_peak.py FOLDER

measures that of a sequence that the processes share. The first one writes FOLDER/peak.json.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig

from patience import patience

TOKENS = 1024
TILE = 2**18  # elements of the loss's tiles, of a small model's size


def small(layers: int = 6) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=3000, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=256, attention_dropout=0.0,
    )  # fmt: skip


def with_numbers(model: Any) -> Any:
    """A model of the meta device, on the CPU."""
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq.fill_(0.1)
    return model


def peak_of_a_step(model: torch.nn.Module, ids: torch.Tensor, folder: Path, **inputs: Any) -> int:
    """Bytes that the CPU's allocator had given out at most, beyond those at the start."""
    inputs |= {"input_ids": ids, "labels": ids, "use_cache": False}

    def step() -> None:
        loss = model(**inputs).loss
        loss.backward()

    step()  # what is made once
    return peak_of(step, folder)


def peak_of(work: Callable[[], Any], folder: Path) -> int:
    """Bytes that the CPU's allocator had given out at most, beyond those at the start. Writes a trace into `folder`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    trace = folder / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def main() -> None:
    import torch.distributed as dist

    from app.planning.planner import Plan, PlannedRun, Way
    from longlora_ext.loss import tile_loss
    from longlora_ext.parallel import SequenceGroup

    dist.init_process_group("gloo")
    rank, ranks, exchange = dist.get_rank(), dist.get_world_size(), dist.all_to_all_single

    def exchange_and_wait(*tensors: Any, **options: Any) -> Any:
        done = exchange(*tensors, **options)
        time.sleep(patience(0.1))  # gloo's threads hold what they have sent a little longer
        return done

    dist.all_to_all_single = exchange_and_wait
    tile_loss.__defaults__ = (TILE,)
    found = {}
    ids = torch.randint(0, 3000, (1, TOKENS // ranks))
    positions = torch.arange(TOKENS)[None].chunk(ranks, dim=1)[rank].contiguous()
    folder = Path(sys.argv[1]) / str(rank)
    folder.mkdir(exist_ok=True)
    for name, way in {"default": Way(), "no checkpoints": Way(checkpointing=False)}.items():
        for by in ("halo", "ulysses"):
            model = with_numbers(Plan(small(), TOKENS, PlannedRun(dtype=torch.float32)).model(way))
            group = SequenceGroup(by=by)
            inputs: Any = {"position_ids": positions, "shift_labels": ids, "sequence_group": group}
            found[f"{by}, {name}"] = peak_of_a_step(model, ids, folder, **inputs)
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, found)
    found = {name: max(each[name] for each in every) for name in found}
    if rank == 0:
        (Path(sys.argv[1]) / "peak.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    main()
