"""One of two processes that compare what they compute together with what each computes alone.

    torchrun --nproc_per_node 2 tests/parallel_worker.py RESULT.json

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
from longlora_ext.adapter import lora_config, prepare_model
from longlora_ext.adapter._precision import fp32_state
from longlora_ext.loss import tile_loss
from tiny_models import VOCABULARY, tiny_config, tiny_model, tokens
from zero_worker import ZERO

LENGTH, STEPS, TILE = 32, 3, 5 * VOCABULARY
Found = dict[str, Any]


def main() -> None:
    import deepspeed

    prepare_deepspeed()
    deepspeed.init_distributed()
    found = {f"{kind} {case}": zero(kind, case) for kind in ("zero2", "zero3") for case in ("tied", "full")}
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
        weights.append(fp32_state(engine.module, only_trainable=True))
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

    rank, ids = dist.get_rank(), tokens(1, LENGTH)
    positions = torch.cat([torch.arange(n) for n in (5, 19, 8)])[None]  # one document is cut by the halves
    labels = torch.where(positions == 0, -100, ids)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    count = (shifted != -100).sum()

    alone = tiny_model(dtype=torch.float32).train()
    expected = alone(input_ids=ids, position_ids=positions, labels=labels).loss
    expected.backward()

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
    for name, tile in (("ulysses", None), ("ulysses tiled", TILE)):
        model = tiny_model(dtype=torch.float32).train()
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


def compare(model: PreTrainedModel, alone: PreTrainedModel) -> float:
    """How far the sum of the processes' gradients is from the whole row's, at most."""
    distances = []
    for part, whole in zip(model.parameters(), alone.parameters(), strict=True):
        dist.all_reduce(part.grad)
        distances.append((part.grad - whole.grad).abs().max().item())
    return max(distances)


if __name__ == "__main__":
    main()
