"""`load`: what comes back of an adapter folder, the extended model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longlora_ext._record import WEIGHTS, apply_record, check_shape, check_weights, read_record
from longlora_ext.attention import NAME

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")


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
    weights = weights_of_adapter(folder)
    base, hub = base_of(folder, base_model), _hub_arguments(from_pretrained_kwargs)
    with naming(f"the base model {base}"):
        config = AutoConfig.from_pretrained(base, **hub)
    check_shape(config, record, base)
    apply_record(config, record)
    with naming(f"the base model {base}"):
        model = AutoModelForCausalLM.from_pretrained(base, config=config, **from_pretrained_kwargs)
    check_weights(dict(model.named_parameters()).get, record, base)
    with naming(f"{weights} as adapter_config.json describes it"):
        return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False).eval()


def weights_of_adapter(folder: Path) -> Path:
    """The file with an adapter's weights."""
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}: the adapter is incomplete")
    return folder / WEIGHTS


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in one `ValueError` what could not be loaded: the libraries' own messages often leave it out."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load {what}: {' '.join(str(error).split())[:500]}") from error


def base_of(folder: Path, base_model: str | None) -> str:
    """The base model of an adapter folder, or where the caller says that it is now."""
    with naming(str(folder / "adapter_config.json")):
        base = base_model or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError(f"{folder} does not say which base model it was trained on: pass base_model")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise FileNotFoundError(f"the base model is no longer at {base}: pass base_model with where it is now")
    return base


def _hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
