"""`save_adapter`: what was trained, in fp32, whatever the training computed in."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora_ext._folders import appearing, refuse_to_overwrite
from longlora_ext._processes import on_first_process
from longlora_ext.adapter._card import write_card
from longlora_ext.adapter._checkpoint import listed
from longlora_ext.adapter._config_file import complete_config
from longlora_ext.adapter._generation import save_generation_config
from longlora_ext.adapter._precision import fp32_state, give_back_gathered, plain_name
from longlora_ext.adapter._prepare import ADAPTER
from longlora_ext.adapter._record import WEIGHTS, fingerprint_of, write_record
from longlora_ext.adapter._tokenizer import save_tokenizer
from longlora_ext.config import context_length


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Save what was trained, in fp32, together with what the context extension changed.

    Every process calls it; the first one writes. The folder appears under its name only when it is complete.

    Args:
        model: What `prepare_model` returned, sharded by `fully_shard` or not, or a wrapper of it (torch.compile, DDP,
            DeepSpeed).
        folder: Must not exist, or be empty. It receives `adapter_model.safetensors` (LoRA, embedding, norms),
            `adapter_config.json`, `longlora.json`, a model card (`README.md`) and the model's `generation_config.json`,
            which `load` and `merge` take over; after full fine-tuning it becomes a plain model folder.
        tokenizer: Saved beside, with a `model_max_length` of at least the context.

    Raises:
        FileExistsError: The folder holds something.
        OSError: There is no room for it.
        ValueError: The model is not one to save here, its adapter is merged into it, a weight is not finite, or one
            trains that is no part of the adapter.
    """
    give_back_gathered(model)
    model = unwrapped(model)
    if not isinstance(model, (PeftModel, PreTrainedModel)):
        raise ValueError(
            f"model must be what prepare_model returned, or its wrapper, but it is a {type(model).__name__}"
        )
    if isinstance(model, PeftModel) and list(model.peft_config) != [ADAPTER]:
        raise ValueError(f"the model must have the one adapter of prepare_model, but it has {list(model.peft_config)}")
    if any(getattr(module, "merged", False) for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise ValueError(
            "the adapter is merged into the model, which cannot be told from another: unmerge_adapter() first"
        )
    target = Path(folder)
    on_first_process(lambda: refuse_to_overwrite(target))
    weights = _weights_of(model)
    if isinstance(model, PeftModel):
        on_first_process(lambda: _check_all_is_saved(model, weights))
    state = fp32_state(weights.items())
    fingerprint = fingerprint_of(model, weights.values()) if isinstance(model, PeftModel) else {}

    def write() -> None:
        if broken := [name for name, weight in state.items() if not weight.isfinite().all()]:
            raise ValueError(f"weights are not finite, as the training diverged; nothing is saved: {listed(broken)}")
        with appearing(target) as unfinished:
            if isinstance(model, PeftModel):
                _write_adapter(model, state, fingerprint, unfinished)
            else:
                _write_model(model, state, unfinished)
            if tokenizer is not None:
                save_tokenizer(tokenizer, unfinished, context_length(model.config))

    on_first_process(write)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers of torch.compile, DDP and DeepSpeed."""
    while not isinstance(model, (PeftModel, PreTrainedModel)):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _weights_of(model: PeftModel | PreTrainedModel) -> dict[str, torch.Tensor]:
    """What to save, by its names in the file: of an adapter all that belongs to it, as a weight that is frozen now may
    have been trained before."""
    weights: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if isinstance(model, PeftModel):
        buffers = model.named_buffers(remove_duplicate=False)
        weights |= {name: buffer for name, buffer in buffers if ADAPTER in name.split(".")}  # VeRA's projections
        weights = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    return {plain_name(name): weight for name, weight in weights.items()}


def _check_all_is_saved(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` for weights that train and are no part of the adapter: they would be lost without a word."""
    named = [(plain_name(name), weight) for name, weight in model.named_parameters(remove_duplicate=False)]
    saved = {id(weight) for weight in weights.values()}
    # AdaLoRA saves parts of its weights, and PEFT may let those train that it replaces, while the adapter is disabled.
    saved |= {id(weight) for name, weight in named if {ADAPTER, "original_module"} & set(name.split("."))}
    lost = {
        id(weight): name.removeprefix("base_model.model.")
        for name, weight in named
        if weight.requires_grad and id(weight) not in saved
    }
    if lost:
        raise ValueError(
            f"weights train that are no part of the adapter, and would not be saved: {listed(lost.values())}. Name "
            "their modules in modules_to_save of lora_config, before the training"
        )


def _write_adapter(
    model: PeftModel, tensors: dict[str, torch.Tensor], fingerprint: dict[str, list[float]], folder: Path
) -> None:
    # PEFT reads a tied weight under all its names, and safetensors wants no two names for the same memory.
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    tensors = {name: tensor if first[id(tensor)] == name else tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    peft_config = model.peft_config[ADAPTER]
    was = peft_config.inference_mode
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    peft_config.inference_mode = was
    save_generation_config(model, folder)
    record = write_record(folder, model.get_base_model().config, fingerprint, tensors)
    write_card(folder, record, peft_config)


def _write_model(model: PreTrainedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    buffers = dict(model.named_buffers())
    state = state | {name: buffers[name] for name in model.state_dict() if name in buffers}
    model.save_pretrained(folder, state_dict={plain_name(name): tensor for name, tensor in state.items()})
    # Under ZeRO the model computes in another dtype than its masters have; the config names that of the file.
    complete_config(folder, dtype="float32")
