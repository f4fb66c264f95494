"""FSDP: weights, gradients and optimizer sharded over the processes by torch itself, without DeepSpeed.

The Trainer and accelerate do it, by the second version of FSDP (`fully_shard`): each process keeps a shard of every
weight, and gathers a layer when it is its turn. Here is what of their many options is taken, and how.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import accelerate
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments

from app.runs.json_files import json_option

#: What may stand behind --fsdp, and what it says in terms of --fsdp_config.
WORDS: dict[str, dict[str, bool]] = {
    "true": {},  # or nothing at all
    "full_shard": {"reshard_after_forward": True},
    "shard_grad_op": {"reshard_after_forward": False},
    "offload": {"cpu_offload": True},
    "auto_wrap": {},  # which is done in any case
}
FIRST_VERSION_ONLY = ("hybrid_shard", "hybrid_shard_zero2", "no_shard")

#: What may stand in --fsdp_config, and its values.
FIELDS: dict[str, tuple[Any, ...]] = {
    "version": (2,),
    "reshard_after_forward": (True, False),
    "cpu_offload": (True, False),
    "activation_checkpointing": (False,),
    "cpu_ram_efficient_loading": (True, False),
    "state_dict_type": ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
    "transformer_layer_cls_to_wrap": (),  # names of classes of the model
}

#: The versions that this was tested with. Older ones gather the output layer, which a tiled loss calls several times,
#: in other ways.
NEEDED = {torch: "2.13", transformers: "5.23", accelerate: "1.15"}


def check_fsdp(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be had with --fsdp, or without it.

    Args:
        parser: Says what is wrong, and ends the program.
        options: What `parser` made of the command line.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        parser.error(
            "accelerate is configured for FSDP, and the Trainer would take half of it from there: take it out of that "
            "configuration, and give --fsdp full_shard"
        )
    if not options.fsdp:
        if options.fsdp_config:
            parser.error("--fsdp_config has no effect without --fsdp")
        return
    for library, version in NEEDED.items():
        if Version(library.__version__).release < Version(version).release:
            parser.error(f"--fsdp needs {library.__name__} {version} or newer, and this is {library.__version__}")
    try:
        config = fsdp_config(options)
    except ValueError as error:
        parser.error(str(error))
    instead = {
        "deepspeed": "DeepSpeed shards the same weights. Start the program with torchrun, without --deepspeed",
        "load_in_4bit": "weights in 4 bits go with ZeRO-2, or with torchrun alone",
        "fp16": "it computes in bf16 or fp32. Give --bf16",
        "use_liger_kernel": "its loss reads weights that are sharded. Without it the loss is computed in tiles",
        "torch_compile": "a compiled model is not sharded",
        "accelerator_config": "--fsdp fills it in",
        "auto_find_batch_size": "a model is sharded once. Give --per_device_train_batch_size",
        "load_best_model_at_end": "the processes may take different checkpoints for the best. docs/resume.md has how "
        "to make an adapter of a checkpoint",
    }
    for option, why in instead.items():
        if getattr(options, option):
            parser.error(f"--fsdp does not work with --{option}: {why}")
    if "RANK" not in os.environ:
        parser.error("--fsdp needs processes to share the model: start the program with torchrun --nproc_per_node 2")
    if config["cpu_offload"] and not torch.accelerator.is_available():
        parser.error("--fsdp offload needs a GPU: on a CPU the weights are in host memory already")
    if options.save_only_model and config["state_dict_type"] == "SHARDED_STATE_DICT":
        parser.error('--save_only_model needs "state_dict_type": "FULL_STATE_DICT" in --fsdp_config')


def fsdp_config(options: argparse.Namespace) -> dict[str, Any]:
    """What --fsdp and --fsdp_config say, as the Trainer takes it: all fields but the classes have a value.

    Raises:
        ValueError: They do not say what they should.
    """
    config: dict[str, Any] = {}
    given = json_option("fsdp_config", options.fsdp_config) if options.fsdp_config else {}
    for name, value in given.items():
        name = name.removeprefix("fsdp_")
        if name not in FIELDS:
            raise ValueError(f"--fsdp_config has {name!r}; with version 2 of FSDP it may have {', '.join(FIELDS)}")
        config[name] = _value(name, value)
    words = str(options.fsdp).lower().split()
    for word in words:
        if word in FIRST_VERSION_ONLY:
            raise ValueError(f"--fsdp {word} is of the first version of FSDP, which is not taken: give full_shard")
        if word not in WORDS:
            raise ValueError(f"--fsdp must be {' or '.join(WORDS)}, got {word!r}")
        for name, value in WORDS[word].items():
            if config.setdefault(name, value) != value:
                raise ValueError(f"--fsdp {word} and {name} = {json.dumps(config[name])} say different things")
    # The Trainer's own default gathers the whole model in the first process for each checkpoint.
    whole = "FULL_STATE_DICT" if options.save_only_model else "SHARDED_STATE_DICT"
    defaults = {"reshard_after_forward": True, "cpu_offload": False, "cpu_ram_efficient_loading": False}
    return {"version": 2, **defaults, "state_dict_type": whole, **config}


def _value(name: str, value: Any) -> Any:
    """A field's value. Files written for older versions have words for truth values, and single names for lists."""
    if name == "transformer_layer_cls_to_wrap":
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
            raise ValueError(f"--fsdp_config {name} must be names of classes, got {json.dumps(value)}")
        return names
    read = {"true": True, "false": False, "1": 1, "2": 2}.get(value.lower(), value) if isinstance(value, str) else value
    for known in FIELDS[name]:
        if read == known and type(read) is type(known):
            return known
    if name == "version":
        raise ValueError(f"--fsdp_config version must be 2, got {json.dumps(value)}: the first is not taken")
    if name == "activation_checkpointing":
        raise ValueError(f"--fsdp_config {name}: an adapter in layers that FSDP wraps so is not saved; give --{name}")
    wanted = " or ".join(json.dumps(known) for known in FIELDS[name])
    raise ValueError(f"--fsdp_config {name} must be {wanted}, got {json.dumps(value)}")


def compute_in(args: TrainingArguments, dtype: torch.dtype) -> None:
    """Have the layers gathered, and computed, in `dtype`; shards and gradients that are added up stay fp32.

    accelerate's own policy would round to bf16 the gradients of the processes, the loss, and with all other arguments
    of the model the number of tokens that a step's loss is divided by.
    """
    if dtype != torch.float32:
        args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def choose_layers(args: TrainingArguments, model: PreTrainedModel | PeftModel) -> None:
    """Settle which modules of a prepared model are gathered one at a time.

    Raises:
        ValueError: The model has none of those that are named, or names none itself; or it is one to load as a whole.
    """
    option = "--fsdp_config transformer_layer_cls_to_wrap"
    config: dict[str, Any] = args.fsdp_config  # type: ignore[assignment]
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    classes = {type(module).__name__ for module in model.modules()}
    named = config.get("transformer_layer_cls_to_wrap")
    if missing := set(named or ()) - classes:
        raise ValueError(f"{option}: the model has no module of the class {min(missing)}")
    if config["cpu_ram_efficient_loading"] and isinstance(model, PeftModel) and base.config.tie_word_embeddings:
        raise ValueError(
            "--fsdp_config cpu_ram_efficient_loading tears the tied embeddings of a model with an adapter apart: take "
            "it out"
        )
    layers = named or sorted(set(base._no_split_modules or ()) & classes)
    if not layers:
        raise ValueError(f"{type(base).__name__} does not say what its layers are: name their class by {option}")
    args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = layers
