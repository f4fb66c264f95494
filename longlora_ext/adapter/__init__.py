"""Fine-tuning an extended model: LoRA with trainable embedding and norms, or all weights; save, load, merge.

    model = prepare_model(model, lora_config(model))     # or prepare_model(model, None): full fine-tuning
    ...                                                  # train, with or without DeepSpeed
    save_adapter(model, "adapter", tokenizer)            # LoRA + embedding + norms + RoPE + group size
    model = load("adapter")                              # the extended model, ready to generate
    merge("adapter", "merged")                           # a plain model folder

Embedding and norms must train in fp32: at a learning rate of 2e-5 a step is smaller than half the distance
between two bfloat16 numbers, so in bf16 most of their weights never move. Without a launcher and under DDP the
trainable weights themselves are fp32 while activations keep the base model's dtype; DeepSpeed, where it trains
in bf16, makes all weights bf16 and has fp32 masters of its own. What is saved is the fp32 weight in every case.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from longlora_ext._folders import appearing, refuse_to_overwrite
from longlora_ext._processes import on_first_process
from longlora_ext.adapter._checkpoint import listed
from longlora_ext.adapter._config_file import complete_config
from longlora_ext.adapter._generation import keep_generation_config, save_generation_config, stop_at, stops
from longlora_ext.adapter._import import import_longlora
from longlora_ext.adapter._load import load, load_base
from longlora_ext.adapter._merge import merge
from longlora_ext.adapter._norms import names_for_peft, norms_of
from longlora_ext.adapter._precision import fp32_state, give_back_gathered, plain_name, train_in_fp32
from longlora_ext.adapter._record import WEIGHTS, fingerprint_of, write_record
from longlora_ext.adapter._tying import is_tied, settle_tying

__all__ = [
    "import_longlora",
    "is_tied",
    "load",
    "load_base",
    "lora_config",
    "merge",
    "prepare_model",
    "save_adapter",
    "stop_at",
    "stops",
]

_ADAPTER = "default"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def lora_config(model: PreTrainedModel, **overrides: Any) -> LoraConfig:
    """
    The recipe of LongLoRA as a PEFT config: LoRA on the attention projections, embedding and norms trained in
    full.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model to fine-tune; its modules are looked at, not changed.
        overrides:
            Fields of [`peft.LoraConfig`], in place of r=8, lora_alpha=16, no dropout, the four projections as
            `target_modules` and embedding and norms as `modules_to_save`.

    Returns:
        [`peft.LoraConfig`]: tied embeddings are trained as one and stay tied.

    Raises:
        `ValueError`: the model has not all of `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `target_modules` are
        not given; or it has a norm that could not be trained, and `modules_to_save` are not given.
    """
    modules = dict(model.named_modules())
    last = {name.rpartition(".")[2] for name in modules}
    targets = [name for name in _PROJECTIONS if name in last]
    missing = [name for name in _PROJECTIONS if name not in targets]
    if missing and "target_modules" not in overrides:  # what is there alone would be another recipe
        there = f"{', '.join(targets)} but " if targets else ""
        raise ValueError(
            f"{type(model).__name__} has {there}no {', '.join(missing)}: pass target_modules=[...] with the names of "
            "its attention projections"
        )
    embedding = next(name for name, module in modules.items() if module is model.get_input_embeddings())
    fields: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
    }
    fields.update(overrides)
    if "modules_to_save" not in fields:
        outside = [name for name in norms_of(model) if not name.startswith(f"{embedding}.")]  # Inkling has one within
        fields["modules_to_save"] = names_for_peft(model, [embedding, *outside])
    if is_tied(model) and any(embedding.endswith(name) for name in fields["modules_to_save"] or ()):
        fields.setdefault("ensure_weight_tying", True)
    return LoraConfig(**fields)


def prepare_model(model: PreTrainedModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """
    Make a model trainable, with trainable weights that take small steps.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The extended model, in the dtype to compute in; it is changed.
        peft_config ([`peft.PeftConfig`], *optional*):
            Such as [`lora_config`] makes. `None` is full fine-tuning: all weights train.

    Returns:
        The model with its adapter, or the model itself. Trainable weights are fp32, except under ZeRO-3,
        which keeps fp32 masters of them.

    Raises:
        `ValueError`: the model has an adapter already, or PEFT leaves a module frozen that `peft_config` names in
            `modules_to_save`, or unties what it says is tied.
    """
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model has an adapter already: pass the base model")
    settle_tying(model)
    in_fp32 = not is_deepspeed_zero3_enabled()
    if peft_config is None:
        model.requires_grad_(True)
        keep_generation_config(model)
        return model.float() if in_fp32 else model
    dtype, base, tied = model.dtype, model.name_or_path or "", is_tied(model)
    prepared = get_peft_model(model, peft_config, autocast_adapter_dtype=in_fp32)
    if os.path.isdir(base):  # an adapter must find its base from any working directory
        prepared.peft_config[_ADAPTER].base_model_name_or_path = os.path.abspath(base)
    for module in prepared.modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and in_fp32:
            train_in_fp32(copies[_ADAPTER], dtype)
    if not in_fp32:
        for parameter in prepared.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    _check_trained(prepared, peft_config)
    if tied and getattr(peft_config, "ensure_weight_tying", False) and not is_tied(model):
        raise ValueError(
            f"PEFT does not keep the output layer of {type(model).__name__} tied to its embedding while that is "
            "trained: pass modules_to_save=[...] without the embedding"
        )
    return prepared


def _check_trained(prepared: PeftModel, peft_config: PeftConfig) -> None:
    """Raise `ValueError` for a module that should train and does not: PEFT passes over what it does not find."""
    trained = [
        name
        for name, module in prepared.named_modules()
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)
        and all(weight.requires_grad for weight in module.modules_to_save.parameters())
    ]
    for name in getattr(peft_config, "modules_to_save", None) or ():
        if not any(full.endswith(name) for full in trained):
            raise ValueError(f"{name} is to be trained in full (modules_to_save), but PEFT leaves it frozen")


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """
    Save what was trained, in fp32, together with what the context extension changed.

    Every process calls it; the first one writes. The folder appears under its name only when it is complete.

    Args:
        model (`torch.nn.Module`):
            What [`prepare_model`] returned, sharded by `fully_shard` or not, or a wrapper of it (torch.compile, DDP,
            DeepSpeed).
        folder (`str` or `os.PathLike`):
            Must not exist, or be empty. It receives `adapter_model.safetensors` (LoRA, embedding, norms),
            `adapter_config.json`, `longlora.json` and the model's `generation_config.json`, which [`load`] and
            [`merge`] take over; after full fine-tuning it becomes a plain model folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Saved beside.

    Raises:
        `FileExistsError`: the folder holds something.
        `OSError`: there is no room for it.
        `ValueError`: the model is not one to save here, or a weight is not finite.
    """
    give_back_gathered(model)
    model = _unwrapped(model)
    if not isinstance(model, (PeftModel, PreTrainedModel)):
        raise ValueError(
            f"model must be what prepare_model returned, or its wrapper, but it is a {type(model).__name__}"
        )
    if isinstance(model, PeftModel) and list(model.peft_config) != [_ADAPTER]:
        raise ValueError(f"the model must have the one adapter of prepare_model, but it has {list(model.peft_config)}")
    target = Path(folder)
    on_first_process(lambda: refuse_to_overwrite(target))
    state = fp32_state(model, only_trainable=isinstance(model, PeftModel))
    fingerprint = fingerprint_of(model) if isinstance(model, PeftModel) else {}

    def write() -> None:
        if broken := [name for name, weight in state.items() if not weight.isfinite().all()]:
            raise ValueError(f"weights are not finite, as the training diverged; nothing is saved: {listed(broken)}")
        with appearing(target) as unfinished:
            if isinstance(model, PeftModel):
                _write_adapter(model, state, fingerprint, unfinished)
            else:
                _write_model(model, state, unfinished)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)

    on_first_process(write)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers of torch.compile, DDP and DeepSpeed."""
    while not isinstance(model, (PeftModel, PreTrainedModel)):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _write_adapter(
    model: PeftModel, state: dict[str, torch.Tensor], fingerprint: dict[str, list[float]], folder: Path
) -> None:
    tensors = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    tensors = {plain_name(name): tensor for name, tensor in tensors.items()}
    # PEFT reads a tied weight under all its names, and safetensors wants no two names for the same memory.
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    tensors = {name: tensor if first[id(tensor)] == name else tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    peft_config = model.peft_config[_ADAPTER]
    was = peft_config.inference_mode
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    peft_config.inference_mode = was
    save_generation_config(model, folder)
    write_record(folder, model.get_base_model().config, fingerprint, tensors)


def _write_model(model: PreTrainedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    buffers = dict(model.named_buffers())
    state = state | {name: buffers[name] for name in model.state_dict() if name in buffers}
    model.save_pretrained(folder, state_dict={plain_name(name): tensor for name, tensor in state.items()})
    # Under ZeRO the model computes in another dtype than its masters have; the config names that of the file.
    complete_config(folder, dtype="float32")
