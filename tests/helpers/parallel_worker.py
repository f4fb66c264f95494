"""One of two processes that compare what they compute together with what each computes alone.

    torchrun --nproc_per_node 2 tests/helpers/parallel_worker.py RESULT.json

The first one writes what it found, for test_parallel.py to judge.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from app.runs.launch import leave_group, prepare_deepspeed
from app.training.shared_memory import remove_names
from longlora_ext.adapter import lora_config, prepare_model
from longlora_ext.adapter._precision import fp32_state
from longlora_ext.attention import s2attn_forward
from longlora_ext.loss import tile_loss
from longlora_ext.parallel import SequenceGroup
from tiny_models import VOCABULARY, tiny_config, tiny_model, tokens
from zero_worker import ZERO

LENGTH, STEPS, TILE = 32, 3, 5 * VOCABULARY
Found = dict[str, Any]


def main() -> None:
    import deepspeed

    prepare_deepspeed()
    deepspeed.init_distributed()
    remove_names()
    found = {f"{kind} {case}": zero(kind, case) for kind in ("zero2", "zero3") for case in ("tied", "full")}
    found |= {name: shared(*case) for name, case in SHARED.items()} | {"no position_ids": without_positions()}
    found |= ulysses()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    leave_group()


def zero(kind: str, case: str) -> Found:
    """Losses and weights of a few steps under ZeRO, with the plain loss and with the tiled one.

    Every process has a sequence of a length of its own, so that they would not make equally many tiles by themselves.
    """
    from transformers.integrations import HfDeepSpeedConfig

    config = {
        "zero_optimization": ZERO[kind],
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
    }
    known = HfDeepSpeedConfig(config)  # transformers remembers it as long as somebody holds it
    losses, weights = [], []
    for tiled in (False, True):
        model = model_for(case)
        if tiled:
            tile_loss(model, TILE)
        engine = engine_for(model, known.config)
        ids = tokens(1, LENGTH - 16 * dist.get_rank(), seed=dist.get_rank())
        losses.append([])
        for _ in range(STEPS):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses[-1].append(loss.item())
        named = engine.module.named_parameters(remove_duplicate=False)
        weights.append(fp32_state((name, weight) for name, weight in named if weight.requires_grad))
    distance = [(weights[1][name] - weight).abs().max().item() for name, weight in weights[0].items()]
    return {"losses": losses, "distance": max(distance, default=0.0)}


def model_for(case: str) -> Any:
    # No padding: transformers 5.0 fails to initialize its embedding where ZeRO-3 has cut it up.
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=case == "tied", pad_token_id=None)
    return prepare_model(model, None if case == "full" else lora_config(model))


def engine_for(model: Any, config: Found) -> Any:
    import deepspeed

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.1), config=config)
    engine.train()
    return engine


def ulysses() -> Found:
    """Loss and gradients of a packed row that two processes share, against those of the whole row in one."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    rank, (ids, positions, labels) = dist.get_rank(), packed_row()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    count = (shifted != -100).sum()

    whole = {}
    for name, (changes, _) in ULYSSES.items():
        model = tiny_model(dtype=torch.float32, **changes).train()
        whole[name] = model, model(input_ids=ids, position_ids=positions, labels=labels).loss
        whole[name][1].backward()

    config = tiny_config(attn_implementation="s2attn")
    UlyssesSPAttentionHF.register_with_transformers(
        tiny_model(config=config), core_attn_implementation="s2attn", sequence_parallel_size=2, micro_batch_size=1
    )
    half = slice(rank * LENGTH // 2, (rank + 1) * LENGTH // 2)
    inputs = {
        "input_ids": ids[:, half],
        "position_ids": positions[:, half],
        "labels": shifted[:, half],
        "shift_labels": shifted[:, half],
        "num_items_in_batch": count,
    }
    found = {}
    for name, (changes, tile) in ULYSSES.items():
        alone, expected = whole[name]
        model = tiny_model(dtype=torch.float32, **changes).train()
        if tile is not None:
            tile_loss(model, tile)
        loss = model(**inputs).loss
        loss.backward()
        total = loss.detach()
        dist.all_reduce(total)
        found[name] = {"losses": [[expected.item()], [total.item()]], "distance": compare(model, alone)}
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, -3:] = 0
    try:
        model(**inputs, attention_mask=mask)
    except ValueError as error:
        found["mask"] = {"error": str(error)}
    return found


#: DeepSpeed's Ulysses: changes of the config, and elements of the loss's tiles.
ULYSSES: dict[str, tuple[Found, int | None]] = {
    "ulysses": ({}, None),
    "ulysses, a window and a sink": ({"s2attn_window": 5, "s2attn_sink": True}, None),
    "ulysses tiled": ({}, TILE),
}
#: Family, changes of its config, who attends how, and what is done besides.
SHARED: dict[str, tuple[str, Found, str, str]] = {
    "halo": ("llama", {}, "auto", "train"),
    "ulysses in groups": ("llama", {}, "ulysses", "train"),
    "dense": ("llama", {"s2attn_mode": "dense"}, "auto", "train"),
    "dense by halo": ("llama", {"s2attn_mode": "dense"}, "halo", "train"),
    "evaluation": ("llama", {}, "auto", "eval"),
    "checkpoints": ("llama", {}, "auto", "checkpoints"),
    "tiled": ("llama", {}, "auto", "tiled"),
    "nine heads": ("llama-9-heads-on-3", {}, "auto", "train"),
    "nine dense heads": ("llama-9-heads-on-3", {"s2attn_mode": "dense"}, "auto", "train"),
    "one head": ("llama-1-head", {}, "auto", "train"),
    "a window and a sink": ("qwen2", {"s2attn_window": 5, "s2attn_sink": True}, "auto", "train"),
    "a window and a sink by ulysses": ("llama", {"s2attn_window": 5, "s2attn_sink": True}, "ulysses", "train"),
    "sliding layers": ("mistral", {"sliding_window": 20}, "auto", "train"),
    "dense sliding layers": ("mistral", {"sliding_window": 20, "s2attn_mode": "dense"}, "auto", "train"),
    "sliding layers in evaluation": ("mistral", {"sliding_window": 7}, "ulysses", "eval"),
    "qwen3": ("qwen3", {}, "auto", "checkpoints"),
    "gemma": ("gemma", {}, "auto", "train"),
}


def packed_row() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of a row, their places in three documents, of which one is cut by the halves, and labels."""
    ids = tokens(1, LENGTH)
    positions = torch.cat([torch.arange(n) for n in (5, 19, 8)])[None]
    return ids, positions, torch.where(positions == 0, -100, ids)


def shared(family: str, changes: Found, by: str, way: str) -> Found:
    """Loss and gradients of a packed row that processes share by a `SequenceGroup`, against those of one process."""
    ids, positions, labels = packed_row()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    models = [tiny_model(family, dtype=torch.float32, **changes).train(way != "eval") for _ in range(2)]
    alone, model = models
    expected = alone(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss
    expected.backward()
    if way == "checkpoints":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif way == "tiled":
        tile_loss(model, TILE)
    group = SequenceGroup(dist.group.WORLD, by)
    ids, positions, own = (x.chunk(dist.get_world_size(), 1)[dist.get_rank()] for x in (ids, positions, shifted))
    loss = model(
        input_ids=ids, position_ids=positions, labels=own, shift_labels=own, num_items_in_batch=(shifted != -100).sum(),
        sequence_group=group, use_cache=False,
    ).loss  # fmt: skip
    layers = group.layers
    loss.backward()
    total = loss.detach()
    dist.all_reduce(total)
    return {"losses": [expected.item(), total.item()], "distance": compare(model, alone), "layers": layers}


def without_positions() -> Found:
    """What a layer is told that knows no positions, or padding by a mask."""
    found = {}
    model = tiny_model(dtype=torch.float32).train()
    ids, positions, _ = (x[:, :16] for x in packed_row())
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    layer, x = model.model.layers[0].self_attn, torch.zeros(1, 4, 16, 8)
    group = SequenceGroup(dist.group.WORLD)
    rotated = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = tiny_model(dtype=torch.float32, rope_parameters=rotated).train()
    for name, call in {
        "dynamic": lambda: dynamic(input_ids=ids, position_ids=positions, sequence_group=group),
        "none": lambda: s2attn_forward(layer, x, x, x, None, sequence_group=group),
        "mask": lambda: model(input_ids=ids, position_ids=positions, attention_mask=mask, sequence_group=group),
        "cache": lambda: s2attn_forward(layer, x[:, :, :4], x, x, None, position_ids=positions, sequence_group=group),
    }.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    return found


def compare(model: PreTrainedModel, alone: PreTrainedModel) -> float:
    """How far the sum of the processes' gradients is from the whole row's, at most."""
    distances = []
    for part, whole in zip(model.parameters(), alone.parameters(), strict=True):
        dist.all_reduce(part.grad)
        distances.append((part.grad - whole.grad).abs().max().item())
    return max(distances)


if __name__ == "__main__":
    main()
