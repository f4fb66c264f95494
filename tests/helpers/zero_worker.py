"""One process of a DeepSpeed or DDP run that trains for twenty steps and saves, started by test_adapter_zero.py.

    torchrun --nproc_per_node 2 tests/helpers/zero_worker.py FOLDER ddp|zero2|zero3|zero3_offload CASE...

A case is the name of a base model in FOLDER, with ".full" behind it for full fine-tuning, or ".fp32" for LoRA in fp32
throughout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from app.runs.launch import leave_group, prepare_deepspeed
from app.training.shared_memory import remove_names
from longlora_ext.adapter import lora_config, prepare_model, save_adapter
from longlora_ext.independence import check_documents_apart
from tiny_training import LEARNING_RATE, batches, extended_model, lora_a

ZERO = {
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},  # every weight is really cut up
    "zero3_offload": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
    },
}


def main() -> None:
    folder, kind, cases = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    start(kind)
    for case in cases:
        base, _, variant = case.partition(".")
        full, dtype = variant == "full", torch.float32 if variant == "fp32" else torch.bfloat16
        keep = deepspeed_config(kind, dtype)  # transformers remembers it as long as somebody holds it
        torch.manual_seed(0)
        model = extended_model(folder / base, dtype)
        model = prepare_model(model, None if full else lora_config(model))
        if not full and dist.get_rank() == 0:
            save_file(lora_a(model), folder / f"{case}.lora_a")
        check_documents(model)
        optimizer = torch.optim.AdamW(
            [weight for weight in model.parameters() if weight.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
        )
        wrapped = train_ddp(model, optimizer) if keep is None else train_zero(model, optimizer, keep.config)
        check_documents(wrapped)
        save_adapter(wrapped, folder / f"{case}.{kind}")
        try:
            save_adapter(wrapped, folder / f"{case}.{kind}")
        except (FileExistsError, RuntimeError) as error:  # the first process's own error, and word of it
            assert "nothing is overwritten" in str(error)
        else:
            raise AssertionError("a second save to the same folder was not refused everywhere")
    leave_group()


def check_documents(model: torch.nn.Module) -> None:
    """On every process, before and after DeepSpeed has prepared the model: they are apart, and a leak is found."""
    check_documents_apart(model)
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.1.self_attn.v_proj"))
    leak = layer.register_forward_hook(lambda module, args, output: output + 0.01 * output.cumsum(dim=1))
    try:
        check_documents_apart(model)
    except ValueError as error:
        assert "documents packed into one row see each other, beginning in " in str(error)
        assert "layers.1.self_attn.v_proj" in str(error)
    else:
        raise AssertionError("documents that see each other were not found out")
    leak.remove()


def start(kind: str) -> None:
    if kind == "ddp":
        dist.init_process_group("gloo")
        return
    import deepspeed

    prepare_deepspeed()
    deepspeed.init_distributed()
    remove_names()


def deepspeed_config(kind: str, dtype: torch.dtype):
    if kind == "ddp":
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(
        {
            "zero_optimization": ZERO[kind],
            "bf16": {"enabled": dtype == torch.bfloat16},
            "gradient_clipping": 0.0,  # or DeepSpeed clips to 1, which training without it does not
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    )


def train_ddp(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.nn.Module:
    wrapped = torch.nn.parallel.DistributedDataParallel(model.train())
    for batch in batches(dist.get_rank()):
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped


def train_zero(model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict) -> torch.nn.Module:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    for batch in batches(dist.get_rank()):
        engine.backward(engine(**batch).loss)
        engine.step()
    return engine


if __name__ == "__main__":
    main()
