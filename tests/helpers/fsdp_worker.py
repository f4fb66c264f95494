"""One of two processes that share a tiny model by FSDP (`fully_shard`), started by test_fsdp.py.

    torchrun --nproc_per_node 2 tests/helpers/fsdp_worker.py FOLDER CHECK

A check is a function below; all are called on both processes, without the Trainer and accelerate.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

from longlora_ext.adapter import load, lora_config, merge, prepare_model, save_adapter
from longlora_ext.loss import tile_loss
from tiny_models import VOCABULARY, tokens
from tiny_training import extended_model

LENGTHS = (20, 60)  # tokens of the two processes' rows: tiles of 20 are one and three


def by_layers(model: nn.Module, **options: Any) -> nn.Module:
    """As torch's tutorial shards a model: each layer by itself, and all the rest together."""
    for layer in model.get_decoder().layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def by_ends(model: nn.Module, with_norm: bool = False, **options: Any) -> nn.Module:
    """As accelerate does where LoRA is trained: the embedding and the output layer by themselves, together if they are
    tied; the output layer stays gathered from the forward to the backward pass."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    last = [model.get_decoder().norm] if with_norm else []
    if embedding.weight is output.weight:
        last.append(embedding)
    else:
        fully_shard(embedding, **options)
    fully_shard([*last, output], **options, reshard_after_forward=False)
    return by_layers(model, **options)


def by_ends_with_norm(model: nn.Module, **options: Any) -> nn.Module:
    """As accelerate does where all weights are trained."""
    return by_ends(model, with_norm=True, **options)


def by_output(model: nn.Module, **options: Any) -> nn.Module:
    """The output layer by itself, gathered whenever it is called."""
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        fully_shard(model.get_output_embeddings(), **options)
    return by_layers(model, **options)


def prepared(base: Path, full: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = extended_model(base, dtype)
    return prepare_model(model, None if full else lora_config(model, init_lora_weights=False)).train()


def gradients(folder: Path) -> None:
    """Those of a tiled loss, in two passes, are the mean of those of two unsharded models with the plain loss."""
    shardings = (by_layers, by_ends, by_ends_with_norm, by_output)
    for tied, full, shard, tile in product((True, False), (True, False), shardings, (20, 1000)):
        alone = prepared(folder / ("tied" if tied else "untied"), full)
        shared = copy.deepcopy(alone)
        tile_loss(shared, tile * VOCABULARY)
        shard(shared)
        for step in range(2):
            rows = [tokens(1, length, seed=step) for length in LENGTHS]
            sum(alone(input_ids=row, labels=row).loss / 2 for row in rows).backward()
            row = rows[dist.get_rank()]
            shared(input_ids=row, labels=row).loss.backward()
            found = {name: weight.grad for name, weight in shared.named_parameters() if weight.requires_grad}
            for name, weight in alone.named_parameters():
                if weight.requires_grad:
                    what = f"tied {tied}, full {full}, {shard.__name__}, tile {tile}, pass {step}: {name}"
                    assert found[name] is not None, what
                    error = (found[name].full_tensor() - weight.grad).norm()
                    assert error <= 1e-4 * weight.grad.norm() + 1e-8, (what, error, weight.grad.norm())
            alone.zero_grad()
            shared.zero_grad()


def checkpointed(model: nn.Module, **options: Any) -> nn.Module:
    """As accelerate does with FSDP's own activation checkpointing: a wrapper around each layer, in all names."""
    layers = model.get_decoder().layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    return by_ends(model, **options)


def offloaded(model: nn.Module, **options: Any) -> nn.Module:
    return by_ends(model, **options, offload_policy=CPUOffloadPolicy(pin_memory=False))


def replicated(model: nn.Module, **options: Any) -> nn.Module:
    """HSDP: shards of one process each, on both."""
    return by_ends(model, **options, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def hybrid(model: nn.Module, **options: Any) -> nn.Module:
    """HSDP: shards on both processes, replicated once."""
    return by_ends(model, **options, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")))


def from_above(model: nn.Module, **options: Any) -> nn.Module:
    """All weights together, by a module that is none of ours."""
    wrapper = nn.Module()
    wrapper.module = model
    wrapper.forward = model.forward
    return fully_shard(wrapper, **options)


def saving(folder: Path) -> None:
    """What is saved behind a step and a look at the result is the sharded fp32 weights, and no rounding of them."""
    cases = [*product((True, False), (True, False), (by_ends, checkpointed))]
    cases += [(True, False, shard) for shard in (by_layers, offloaded, replicated, hybrid, from_above)]
    for tied, full, shard in cases:
        output = folder / f"tied {tied}, full {full}, {shard.__name__}"
        model = prepared(folder / ("tied" if tied else "untied"), full, torch.bfloat16)
        computing_in_bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        wrapped = shard(model, mp_policy=computing_in_bf16)
        optimizer = torch.optim.SGD([weight for weight in wrapped.parameters() if weight.requires_grad], lr=0.1)
        ids = tokens(1, 60, seed=dist.get_rank())
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        masters = {id(weight): weight.full_tensor() for weight in optimizer.param_groups[0]["params"]}
        names = {
            name.replace("_checkpoint_wrapped_module.", "")
            .replace(".modules_to_save.default", "")
            .replace(".default", ""): masters[id(weight)]
            for name, weight in model.named_parameters()
            if id(weight) in masters
        }
        with torch.no_grad():
            wrapped(input_ids=ids)  # leaves what it has gathered in bf16 where it is
        save_adapter(wrapped, output)
        saved = load_file(output / ("model.safetensors" if full else "adapter_model.safetensors"))
        for name, master in names.items():
            assert torch.equal(saved[name], master), f"{output.name}: {name}"
        assert set(saved) - set(names) <= {name for name in saved if tied and name.endswith("lm_head.weight")}
        load(output)
        if not full and dist.get_rank() == 0:
            merge(output, output.with_name(f"{output.name} merged"))


def first_version(folder: Path) -> None:
    """A model sharded by FSDP1 is refused, on both processes, and nothing is left behind."""
    for whole in (True, False):
        model = prepared(folder / "untied", full=True)
        if whole:
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        else:
            model.lm_head = FullyShardedDataParallel(model.lm_head, device_id=torch.device("cpu"))
        try:
            save_adapter(model, folder / "first")
        except ValueError as error:
            assert "shard it with torch.distributed.fsdp.fully_shard" in str(error)
        else:
            raise AssertionError("FSDP1 was not refused")
        assert not (folder / "first").exists()


CHECKS: list[Callable[[Path], None]] = [gradients, saving, first_version]


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo")
    next(check for check in CHECKS if check.__name__ == name)(folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
