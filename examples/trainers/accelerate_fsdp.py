"""Extend a model's context with accelerate and FSDP2: each process has a part of the weights.

    torchrun --nproc_per_node 2 examples/trainers/accelerate_fsdp.py

It extends the tiny Llama from 256 to 1024 tokens on source code that every Python has, and saves an adapter.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

import longlora_ext.attention  # noqa: F401  (registers attn_implementation="s2attn")
from longlora_ext import check_documents_apart, extend_config, lora_config, prepare_model, save_adapter, tile_loss
from longlora_ext.data import PackedSequences

MODEL = Path(__file__).parents[1] / "tiny_llama"
TEXT = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:40]
CONTEXT_LENGTH = 1024
STEPS = 20


def main(folder: str = "fsdp_adapter") -> None:
    """Train and save."""
    set_seed(0)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    if not torch.cuda.is_available():  # accelerate takes no notice of FSDP where its processes have no GPUs
        PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(fsdp_plugin=plugin)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = extend_config(AutoConfig.from_pretrained(MODEL), CONTEXT_LENGTH, rope_type="yarn", sink=True)
    base = AutoModelForCausalLM.from_pretrained(MODEL, config=config, attn_implementation="s2attn")
    model = prepare_model(base, lora_config(base))
    tile_loss(model)
    check_documents_apart(model)

    documents = [tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"] for file in TEXT]
    sequences = PackedSequences(documents, CONTEXT_LENGTH, pad_token_id=tokenizer.eos_token_id)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    model, optimizer, rows = accelerator.prepare(model, optimizer, DataLoader(sequences, shuffle=True))

    model.train()
    step = 0
    while step < STEPS:
        for row in rows:
            loss = model(**row, use_cache=False).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            accelerator.print(f"step {step}: loss {accelerator.reduce(loss.detach(), 'mean').item():.3f}")
            if step == STEPS:
                break
    save_adapter(model, folder, tokenizer)  # all processes call it: it gathers what they have
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
