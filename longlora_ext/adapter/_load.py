"""`load`: rebuild the extended model from an adapter folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longlora_ext._errors import naming
from longlora_ext.adapter._checkpoint import Checkpoint, listed, refuse_pointer, weight_files
from longlora_ext.adapter._generation import AsItIs, has_generation_config
from longlora_ext.adapter._record import (
    WEIGHTS,
    apply_record,
    check_shape,
    check_tensors,
    check_tying,
    check_weights,
    read_record,
)
from longlora_ext.adapter._tying import is_tied, settle_tying
from longlora_ext.attention import NAME

MADE_BASE = "base_model"  # the folder of a base model that a run makes of another kind of file
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")


def load(
    folder: str | os.PathLike[str], *, base_model: str | None = None, **from_pretrained_kwargs: Any
) -> PreTrainedModel | PeftModel:
    """The extended model of an adapter folder, in eval mode.

    Args:
        folder: What `save_adapter` wrote, after LoRA or after full fine-tuning.
        base_model: Where the base model is now, if not where it was in training.
        from_pretrained_kwargs: For `AutoModelForCausalLM.from_pretrained`, such as `dtype` (of all weights, the
            adapter's too), `device_map`, or an `attn_implementation` other than `"s2attn"`.

    Returns:
        The `peft.PeftModel`, or the model itself after full fine-tuning.

    Raises:
        FileNotFoundError: The folder is not one of `save_adapter`, or lacks a file.
        ValueError: The folder holds a model as well as an adapter, the base model is not the one that the adapter was
            trained on or does not fit into the GPUs of `device_map`, weights are missing, or something cannot be read.
    """
    folder = Path(folder)
    from_pretrained_kwargs.setdefault("attn_implementation", NAME)
    if not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds neither adapter_config.json nor config.json: it is no folder of save_adapter"
            )
        return load_base(str(folder), what="the model", **from_pretrained_kwargs)
    check_one_model(folder)
    record = read_record(folder)
    weights = weights_of_adapter(folder)
    described = f"{weights} as adapter_config.json describes it"
    with naming(described):
        names, peft_config = list(Checkpoint([weights])), PeftConfig.from_pretrained(str(folder))
    check_tensors(names, record, weights)
    base, hub = base_of(folder, base_model), _hub_arguments(from_pretrained_kwargs)
    with naming(f"the base model {base}"):
        config = AutoConfig.from_pretrained(base, **hub)
    check_shape(config, record, base)
    apply_record(config, record)
    model = load_base(base, config=config, **from_pretrained_kwargs)
    check_tying(peft_config, is_tied(model), base)
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            f"the base model {base} does not fit: device_map leaves weights of it to the host's memory or the disk, "
            "where no adapter can be put on them"
        )
    check_weights(dict(model.named_parameters()).get, record, base)
    if has_generation_config(folder):
        with naming(f"generation_config.json of {folder}"):
            model.generation_config = AsItIs.from_pretrained(str(folder))
    with naming(described):
        # Read to the CPU, and copied from there: by default every process of a machine reads it to the first GPU.
        return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False, torch_device="cpu").eval()


def load_base(model: str, *, what: str = "the base model", **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Load a model as `AutoModelForCausalLM` does, and refuse files that lack weights, which it would make up.

    Its config then says whether the weights are tied, whatever the file's config does.

    Args:
        model: A folder or hub name.
        what: How an error calls it.
        from_pretrained_kwargs: For `from_pretrained`.

    Raises:
        ValueError: The model cannot be loaded, its files lack weights or are not those of its config, or an adapter
            lies with it.
    """
    check_one_model(model)
    with naming(f"{what} {model}"):
        if os.path.isdir(model) and "gguf_file" not in from_pretrained_kwargs:
            for file in weight_files(model):
                refuse_pointer(file)
        wanted = {"output_loading_info": True, "ignore_mismatched_sizes": True, **from_pretrained_kwargs}
        loading: Any = AutoModelForCausalLM.from_pretrained(model, **wanted)
        loaded, found = loading
    for name, in_files, by_config in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{what} {model}: {name} is {list(in_files)} in its files, and {list(by_config)} by its config. The config "
            "is another model's"
        )
    layers = getattr(loaded.config, "num_hidden_layers", None)
    if layers is not None and (further := [name for name in found["unexpected_keys"] if _layer_of(name) >= layers]):
        raise ValueError(f"{what} {model} has {layers} layers by its config, but its files have {listed(further)}")
    if missing := found["missing_keys"]:
        raise ValueError(f"{what} {model} is incomplete: its files have no {listed(missing)}")
    if getattr(loaded, "_hf_peft_config_loaded", False):  # by transformers, off a hub
        raise ValueError(f"{what} {model} has an adapter as well: give each a folder of its own")
    settle_tying(loaded)
    return cast(PreTrainedModel, loaded)


def check_one_model(folder: str | os.PathLike[str]) -> None:
    """Raise `ValueError` for a folder with both a model and an adapter: transformers puts the one on the other, and
    PEFT takes the other alone."""
    if all((Path(folder) / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"{folder} holds a model (config.json) and an adapter (adapter_config.json), and which is meant "
            "is not clear: give each a folder of its own"
        )


def _layer_of(name: str) -> int:
    """The number of the layer that a weight belongs to, or -1."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def weights_of_base(base: str, **hub_arguments: Any) -> Checkpoint:
    """The base model's weights, to be read one by one."""
    check_one_model(base)
    with naming(f"the base model {base}"):
        files = weight_files(base, **hub_arguments)
        if not files:
            raise FileNotFoundError("it has no weights, neither model.safetensors nor pytorch_model.bin")
        return Checkpoint(files)


def weights_of_adapter(folder: Path) -> Path:
    """The file with an adapter's weights."""
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}: the adapter is incomplete")
    return folder / WEIGHTS


def base_of(folder: Path, base_model: str | None) -> str:
    """The base model of an adapter folder, or where the caller says that it is now.

    One that the run has made itself lies beside the adapter, and may have been moved with it.
    """
    with naming(str(folder / "adapter_config.json")):
        base = base_model or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base or not isinstance(base, str):
        raise ValueError(f"{folder} does not say which base model it was trained on: pass base_model")
    if os.path.isabs(base) and not os.path.isdir(base):
        beside = folder.resolve().parent / MADE_BASE
        if base_model is None and os.path.basename(base) == MADE_BASE and beside.is_dir():
            return str(beside)
        raise FileNotFoundError(f"the base model is no longer at {base}: pass base_model with where it is now")
    return base


def _hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
