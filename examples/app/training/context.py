"""The model's context as it is, and the config for the new one."""

from __future__ import annotations

import json

from transformers import PreTrainedConfig, TrainingArguments

from app.models.folders import check_model_folder
from app.models.gguf_rope import read_model_config
from app.models.source import check_config
from app.models.suitable import check_attention, check_context, check_kernels
from app.runs.launch import say
from app.training.arguments import compute_dtype
from app.training.dense_layers import asked_layers
from app.training.options import ModelOptions
from app.training.recipe import ROPE_TYPE
from app.training.shared_sequences import check_sharing
from longlora_ext.config import DEFAULT_GROUP_RATIO, config_for, context_length, rope_type_of, settle_context


def read_base_config(options: ModelOptions) -> PreTrainedConfig:
    """The model's config, in which its present context is settled.

    Raises:
        ValueError, OSError: There is no such model, its config is incomplete, or S2-Attn cannot express its attention.
    """
    check_model_folder(options.model_name_or_path)
    check_config(options.model_name_or_path, options.gguf_file)
    config = read_model_config(options.model_name_or_path, options.gguf_file)
    config = settle_context(config, options.present_context_length)
    check_attention(config, options.context_length)
    return config


def extended(base_config: PreTrainedConfig, options: ModelOptions, args: TrainingArguments) -> PreTrainedConfig:
    """The config for the new context, for a model that can be trained so, here.

    Raises:
        ValueError: It cannot.
    """
    dtype = compute_dtype(args)
    check_kernels(base_config, dtype, args.device, sink=options.sink, window=options.window)
    config = new_context(base_config, options)
    check_sharing(config, options.sequence_parallel_size, options.sequence_parallel)
    return config


def new_context(base_config: PreTrainedConfig, options: ModelOptions) -> PreTrainedConfig:
    """The config for the new context. The model's own leaves RoPE alone, and a shorter one is an error."""
    old = context_length(base_config)
    new = options.context_length or 4 * old
    is_scaled = rope_type_of(base_config) != "default"
    if options.context_length is None and is_scaled:
        say(f"note: the model's RoPE is scaled already, to {old:,} tokens; --context_length {old} leaves it at that")
    check_context("--context_length", new, old)
    return config_for(
        base_config,
        new,
        rope_type=options.rope_type or (None if is_scaled or new == old else ROPE_TYPE),
        rope_parameters=json.loads(options.rope_parameters or "{}"),
        group_ratio=options.group_ratio or DEFAULT_GROUP_RATIO,
        group_size=options.group_size,
        sink=options.sink,
        window=options.window,
        dense_layers=asked_layers(options.dense_layers),
    )
