"""The tokenizer of a run, and its model as it is trained: loaded for the new context, with an adapter on it."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

import longlora_ext.attention  # noqa: F401  (registers attn_implementation="s2attn")
from app.inputs.chat import give_template
from app.models.convert_gguf import convert_gguf
from app.models.four_bits import four_bits
from app.models.suitable import check_tokenizer
from app.models.tokenizer import read_tokenizer
from app.runs.launch import say
from app.runs.run import Run
from app.training.arguments import compute_dtype
from app.training.fsdp import choose_layers
from app.training.options import ModelOptions
from longlora_ext.adapter import is_tied, load_base, lora_config, prepare_model, stop_at
from longlora_ext.adapter._load import MADE_BASE
from longlora_ext.loss import tile_loss, why_not_tiled


def load_tokenizer(options: ModelOptions, task: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, for `--task sft` with a chat template."""
    tokenizer = read_tokenizer(options.model_name_or_path, options.gguf_file)
    check_tokenizer(tokenizer)
    if task == "sft":
        give_template(tokenizer)
    return tokenizer


def build_model(
    options: ModelOptions,
    args: TrainingArguments,
    config: PreTrainedConfig,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
) -> PreTrainedModel | PeftModel:
    """The model to train. Collective.

    Args:
        options: Which model, and what of it is trained.
        args: How it is trained.
        config: Its config for the new context.
        run: What is made of a GGUF file goes into its folder.
        tokenizer: The model's.
        ends: The tokens that end the answers that it learns.
    """
    dtype, path = compute_dtype(args), options.model_name_or_path
    if options.gguf_file:
        path = convert_gguf(path, options.gguf_file, run.folder / MADE_BASE, dtype)
    set_seed(args.seed)
    quantised: dict[str, Any] = {"quantization_config": four_bits(dtype)} if options.load_in_4bit else {}
    base = load_base(path, config=config, dtype=dtype, attn_implementation="s2attn", **quantised)
    lora = None if options.full_finetune else lora_config(base, r=options.lora_r, lora_alpha=options.lora_alpha)
    model = prepare_model(base, lora)
    if new := stop_at(model, ends):
        say(f"note: answers end with {' '.join(tokenizer.convert_ids_to_tokens(new))}: generation will stop there")
    if args.fsdp:
        choose_layers(args, model)
    if not args.use_liger_kernel:  # which has a loss of its own
        spare_logits(model)
    if options.full_finetune and is_tied(base):
        # A checkpoint has a tied weight once. Told so, the Trainer does not warn of the other name when it resumes.
        base._keys_to_ignore_on_save = list(base._tied_weights_keys or ())
    return model


def spare_logits(model: PreTrainedModel | PeftModel) -> None:
    """Compute the loss without the logits of all tokens, wherever that is the same loss."""
    reason = why_not_tiled(model)
    if reason is None:
        tile_loss(model)
    else:
        say(f"note: the logits of whole sequences are kept in memory: {reason}")
