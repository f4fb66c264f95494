"""What comes back of an adapter folder: the extended model (`load`), or a plain model folder (`merge`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from longlora_ext._folders import appearing, refuse_to_overwrite
from longlora_ext._record import WEIGHTS, apply_record, check_shape, check_weights, read_record
from longlora_ext.attention import NAME
from longlora_ext.context import CONFIG_FIELDS

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")


def load(
    folder: str | os.PathLike[str], *, base_model: str | None = None, **from_pretrained_kwargs: Any
) -> PreTrainedModel | PeftModel:
    """
    The extended model of an adapter folder, in eval mode.

    Args:
        folder (`str` or `os.PathLike`):
            What [`~longlora_ext.adapter.save_adapter`] wrote, after LoRA or after full fine-tuning.
        base_model (`str`, *optional*):
            Where the base model is now, if not where it was in training.
        from_pretrained_kwargs:
            For `AutoModelForCausalLM.from_pretrained`, such as `dtype` (of all weights, the adapter's too),
            `device_map`, or an `attn_implementation` other than `"s2attn"`.

    Returns:
        The [`peft.PeftModel`], or the model itself after full fine-tuning.

    Raises:
        `FileNotFoundError`: the folder is not one of `save_adapter`, or incomplete.
        `ValueError`: the base model is not the one that the adapter was trained on, or something cannot be read.
    """
    folder = Path(folder)
    from_pretrained_kwargs.setdefault("attn_implementation", NAME)
    if not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds neither adapter_config.json nor config.json: it is no folder of save_adapter"
            )
        return AutoModelForCausalLM.from_pretrained(folder, **from_pretrained_kwargs)
    record = read_record(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}: the adapter is incomplete")
    base, hub = _base_of(folder, base_model), _hub_arguments(from_pretrained_kwargs)
    with _naming(f"the base model {base}"):
        config = AutoConfig.from_pretrained(base, **hub)
    check_shape(config, record, base)
    apply_record(config, record)
    with _naming(f"the base model {base}"):
        model = AutoModelForCausalLM.from_pretrained(base, config=config, **from_pretrained_kwargs)
    check_weights(model, record, base)
    with _naming(f"{folder / WEIGHTS} as adapter_config.json describes it"):
        return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False).eval()


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say in one `ValueError` what could not be loaded: the libraries' own messages often leave it out."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load {what}: {' '.join(str(error).split())[:500]}") from error


def _base_of(folder: Path, base_model: str | None) -> str:
    with _naming(str(folder / "adapter_config.json")):
        base = base_model or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError(f"{folder} does not say which base model it was trained on: pass base_model")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise FileNotFoundError(f"the base model is no longer at {base}: pass base_model with where it is now")
    return base


def _hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}


def merge(
    folder: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    **from_pretrained_kwargs: Any,
) -> None:
    """
    Write base model and adapter as one plain model folder, which transformers loads with no code of ours.

    Args:
        folder (`str` or `os.PathLike`):
            The adapter folder.
        output_folder (`str` or `os.PathLike`):
            Must not exist, or be empty; it appears when it is complete. The tokenizer comes along, from the
            adapter folder or else from the base model.
        base_model, from_pretrained_kwargs:
            As for [`load`]; `dtype` is that of the merged weights (the base model's if absent).

    Raises:
        `FileExistsError`: the output folder holds something.
        `ValueError`: the folder holds a whole model, not an adapter.
        And what [`load`] raises.
    """
    folder, target = Path(folder), Path(output_folder)
    refuse_to_overwrite(target)
    if (folder / "config.json").is_file():
        raise ValueError(f"{folder} is a plain model folder already: there is nothing to merge")
    model: Any = load(folder, base_model=base_model, **{"attn_implementation": "sdpa", **from_pretrained_kwargs})
    merged = model.merge_and_unload(safe_merge=True)
    for name in CONFIG_FIELDS:
        if hasattr(merged.config, name):
            delattr(merged.config, name)
    tokenizer_folder = _tokenizer_folder(folder, _base_of(folder, base_model))
    with appearing(target) as unfinished:
        merged.save_pretrained(unfinished)
        if tokenizer_folder is not None:
            hub = _hub_arguments(from_pretrained_kwargs)
            AutoTokenizer.from_pretrained(tokenizer_folder, **hub).save_pretrained(unfinished)


def _tokenizer_folder(folder: Path, base: str) -> str | None:
    if (folder / "tokenizer_config.json").is_file():
        return str(folder)
    if os.path.isdir(base) and not os.path.isfile(os.path.join(base, "tokenizer_config.json")):
        return None
    return base
