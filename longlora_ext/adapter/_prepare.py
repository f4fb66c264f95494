"""`lora_config` and `prepare_model`: what trains, and in which dtype.

Embedding and norms must train in fp32: at a learning rate of 2e-5 a step is smaller than half the distance
between two bfloat16 numbers, so in bf16 most of their weights never move. Without a launcher and under DDP the
trainable weights themselves are fp32 while activations keep the base model's dtype; DeepSpeed, where it trains
in bf16, makes all weights bf16 and has fp32 masters of its own.
"""

from __future__ import annotations

import os
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from longlora_ext.adapter._checkpoint import listed
from longlora_ext.adapter._generation import keep_generation_config
from longlora_ext.adapter._lora import PLAIN_STARTS
from longlora_ext.adapter._norms import names_for_peft, norms_of
from longlora_ext.adapter._precision import train_in_fp32
from longlora_ext.adapter._targets import projections_of
from longlora_ext.adapter._tying import is_tied, settle_tying

ADAPTER = "default"  # PEFT's name for the one adapter of a model


def lora_config(model: PreTrainedModel, **overrides: Any) -> LoraConfig:
    """The recipe of LongLoRA as a PEFT config: LoRA on the attention projections, embedding and norms in full.

    Args:
        model: The model to fine-tune; its modules are looked at, not changed.
        overrides: Fields of `peft.LoraConfig`, in place of r=8, lora_alpha=16, no dropout, the projections of the
            attention as `target_modules` and embedding and norms as `modules_to_save`.

    Returns:
        The config. Tied embeddings are trained as one and stay tied.

    Raises:
        ValueError: The attention has no projections that are linear layers (`q_proj`, `k_proj`, `v_proj`, `o_proj`, or
            those of its own names), and `target_modules` are not given; or it has a norm that could not be trained, and
            `modules_to_save` are not given.
    """
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    fields: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "task_type": "CAUSAL_LM",
    }
    fields.update(overrides)
    if "target_modules" not in fields:
        fields["target_modules"] = projections_of(model)
    if "modules_to_save" not in fields:
        outside = [name for name in norms_of(model) if not name.startswith(f"{embedding}.")]  # Inkling has one within
        fields["modules_to_save"] = names_for_peft(model, [embedding, *outside])
    if is_tied(model) and any(embedding.endswith(name) for name in fields["modules_to_save"] or ()):
        fields.setdefault("ensure_weight_tying", True)
    return LoraConfig(**fields)


def prepare_model(model: PreTrainedModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """Make a model trainable, with trainable weights that take small steps.

    Args:
        model: The extended model, in the dtype to compute in; it is changed.
        peft_config: Such as `lora_config` makes. `None` is full fine-tuning: all weights train.

    Returns:
        The model with its adapter, or the model itself. Trainable weights are fp32, except under ZeRO-3,
        which keeps fp32 masters of them.

    Raises:
        ValueError: The model has an adapter already, `peft_config` is one of prompts, the model's vocabulary is not
            that of its files, `init_lora_weights` or `layer_replication` changes the base model, as PiSSA does,
            `lora_bias` is for layers without a bias, or PEFT leaves a module frozen that `peft_config` names in
            `modules_to_save`, or unties what it says is tied.
    """
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model has an adapter already: pass the base model")
    _check_start(peft_config)
    _check_merges(model, peft_config)
    settle_tying(model)
    in_fp32 = not is_deepspeed_zero3_enabled()
    if peft_config is None:
        model.requires_grad_(True)
        keep_generation_config(model)
        return model.float() if in_fp32 else model
    dtype, base, tied = model.dtype, model.name_or_path or "", is_tied(model)
    _check_vocabulary(model, base)
    prepared = get_peft_model(model, peft_config, autocast_adapter_dtype=in_fp32)
    if os.path.isdir(base):  # an adapter must find its base from any working directory
        prepared.peft_config[ADAPTER].base_model_name_or_path = os.path.abspath(base)
    for module in prepared.modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and in_fp32:
            train_in_fp32(copies[ADAPTER], dtype)
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


def _check_start(peft_config: PeftConfig | None) -> None:
    """Raise `ValueError` if it changes the base model before training: an adapter does not hold the rest."""
    if peft_config is not None and peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(peft_config).__name__} learns a prompt and changes no layer, so that nothing would learn to read "
            "further: pass what lora_config makes, or another config of weights"
        )
    start = getattr(peft_config, "init_lora_weights", True)
    if start not in PLAIN_STARTS:
        *others, last = map(repr, PLAIN_STARTS)
        raise ValueError(
            f"init_lora_weights is {start!r}, which changes the base model's weights, so that the adapter would fit no "
            f"model on a disk: it may be {', '.join(others)} or {last}"
        )
    if layers := getattr(peft_config, "layer_replication", None):
        raise ValueError(
            f"layer_replication is {layers!r}, which gives the base model other layers, so that the adapter would fit "
            "no model on a disk: leave it out"
        )


def _check_merges(model: PreTrainedModel, peft_config: PeftConfig | None) -> None:
    """Raise `ValueError` for LoRA with a bias on layers without one: it trains, but cannot be merged."""
    targets = getattr(peft_config, "target_modules", None)
    if not targets or not getattr(peft_config, "lora_bias", False):
        return
    is_all = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    without = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.bias is None
        and (module is not model.get_output_embeddings() if is_all else check_target_module_exists(peft_config, name))
    ]
    if without:
        raise ValueError(
            f"lora_bias=True adds to a bias, but these target_modules have none: {listed(without)}. Leave it out, or "
            "name others"
        )


def _check_vocabulary(model: PreTrainedModel, base: str) -> None:
    """Raise `ValueError` if the vocabulary is no longer that of the model's files, as the adapter is put on those."""
    try:
        stored, _ = model.config.get_config_dict(base, local_files_only=True)
    except OSError:  # the model was made of a config, or its files are no longer there
        return
    here = getattr(model.config, "vocab_size", None)
    if (there := stored.get("vocab_size", here)) != here:
        raise ValueError(
            f"the model has a vocabulary of {here} tokens, but {base} has {there}, and an adapter would not load: save "
            "the model to another folder, and load it from there"
        )


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
