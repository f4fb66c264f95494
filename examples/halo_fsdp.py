"""Train on sequences that processes share, in plain PyTorch with FSDP: the loop to copy into a program of your own.

    torchrun --nproc_per_node 2 examples/halo_fsdp.py

Each process holds a part of every row. Its attention gets from its neighbours what the groups of S2-Attn reach, and
nothing else has to be exchanged but the loss. FSDP shards the weights over the same processes. For a model and rows of
your own, change the names in capitals. With one process the program does the same, alone.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import longlora_ext.attention  # noqa: F401  (registers attn_implementation="s2attn")
from longlora_ext.config import extend_config
from longlora_ext.data import PackedSequences
from longlora_ext.parallel import Cut, SequenceGroup

MODEL = Path(__file__).parent / "tiny_llama"
TEXT = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:12]  # modules of the standard library, a document each
CONTEXT_LENGTH, STEPS = 512, 4


def main() -> None:
    dist.init_process_group()  # gloo, or NCCL on GPUs
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.accelerator.current_accelerator() or torch.device("cpu")

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    documents = [tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"] for file in TEXT]
    rows = PackedSequences(documents, CONTEXT_LENGTH, pad_token_id=tokenizer.eos_token_id)
    # The collator keeps this process's part of each row, with positions that count each document from 0.
    loader = torch.utils.data.DataLoader(rows, collate_fn=Cut(torch.utils.data.default_collate, rank, ranks))

    config = extend_config(AutoConfig.from_pretrained(MODEL), CONTEXT_LENGTH)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, config=config, attn_implementation="s2attn")
    model.to(device)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    group = SequenceGroup()  # who shares a row: all processes, if not a group of torch.distributed is named

    model.train()  # in groups: a module in training mode computes S2-Attn
    for step, batch in zip(range(STEPS), loader, strict=False):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        count = (batch["shift_labels"] != -100).sum()
        dist.all_reduce(count)  # the tokens of the whole row that are learned from
        loss = model(**batch, num_items_in_batch=count, sequence_group=group, use_cache=False).loss
        (loss * ranks).backward()  # FSDP averages over processes, whose gradients are to be added up
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach()
        dist.all_reduce(whole)
        if rank == 0:
            print(f"step {step + 1}: loss {whole.item():.5f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
