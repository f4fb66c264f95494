"""QLoRA in a process that has bitsandbytes: train on a 4-bit base, save, load, and compare.

python tests/helpers/qlora_worker.py BASE_MODEL ADAPTER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import longlora_ext.attention  # noqa: F401
from app.models.four_bits import four_bits
from app.planning.planner import FOUR_BITS, Plan, PlannedRun
from longlora_ext.adapter import load, lora_config, prepare_model, save_adapter
from longlora_ext.config import extend_config
from longlora_ext.loss import tile_loss
from tiny_training import CONTEXT


def main() -> None:
    base, adapter = map(Path, sys.argv[1:])
    quantised = {"quantization_config": four_bits(torch.bfloat16), "dtype": torch.bfloat16}
    config = extend_config(AutoConfig.from_pretrained(base), CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, attn_implementation="s2attn", **quantised)
    model = prepare_model(model, lora_config(model))
    vocabulary = config.vocab_size
    tile_loss(model, 16 * vocabulary).train()
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if weight.dtype == torch.uint8}
    assert len(frozen) == 7 * config.num_hidden_layers
    check_plan(model, [weight for weight in model.parameters() if weight.dtype == torch.uint8])

    ids = torch.randint(3, vocabulary, (2, 100), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.named_parameters() if name in frozen)

    save_adapter(model, adapter)
    for weight in model.parameters():  # as `load` rounds what was trained in fp32
        weight.data = weight.data.bfloat16() if weight.requires_grad else weight.data
    trained, again = model.eval(), load(adapter, **quantised)
    kinds = [{type(module).__name__ for module in part.modules()} for part in (trained, again)]
    assert all("Linear4bit" in found for found in kinds), kinds
    with torch.no_grad():
        logits = [part(ids).logits.float() for part in (trained, again, load(adapter, dtype=torch.bfloat16))]
    distances = [(one - logits[0]).abs().max().item() for one in logits[1:]]
    assert 10 * distances[0] < distances[1], distances  # the base in 4 bits, and in 16
    print("distances", distances, "losses", losses[0], losses[-1])


def check_plan(model: Any, packed: list[Any]) -> None:
    """The planner knows how many weights are packed, and how much memory they are left with."""
    planned = Plan(model.config, CONTEXT, PlannedRun(load_in_4bit=True)).parameters["in_4_bits"]
    assert planned == 2 * sum(weight.numel() for weight in packed)
    states = [weight.quant_state for weight in packed]
    scales = [tensor for state in states for tensor in (state.absmax, state.state2.absmax)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*packed, *scales))
    assert abs(size / (FOUR_BITS * planned) - 1) < 0.01, (size, planned)


if __name__ == "__main__":
    main()
