"""`import_longlora`: the adapters that LongLoRA's own code has written, and its authors have released, as ours."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from longlora_ext._errors import naming
from longlora_ext._folders import appearing, refuse_to_overwrite
from longlora_ext.adapter._card import write_card
from longlora_ext.adapter._checkpoint import listed, load_pickled
from longlora_ext.adapter._load import base_of, weights_of_base
from longlora_ext.adapter._lora import PREFIX, NeedsWholeModel, obstacle
from longlora_ext.adapter._record import FACTORS, WEIGHTS, fingerprint, write_record
from longlora_ext.adapter._stored import StoredModel
from longlora_ext.config import extend_config

_log = logging.getLogger(__name__)
_LORA, _TRAINED = "adapter_model.bin", "trainable_params.bin"
_ADDED = 64  # more rows than these are no special tokens that were added, but the embedding of another model


def import_longlora(
    release: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    context_length: int,
    base_model: str | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Make an adapter folder out of one of the original LongLoRA.

    The original adds a padding token to the vocabulary (32,001 tokens for Llama 2). Nothing is learned of padding, so
    its row of the embedding is left out, a line in the log says so, and the vocabulary is that of the base model.

    Args:
        release: A folder with `adapter_config.json`, `adapter_model.bin` (LoRA) and `trainable_params.bin` (embedding
            and norms; there is none if LoRA alone was trained). Pickles with more than tensors in them are refused.
        output_folder: Must not exist, or be empty; it appears when it is complete. `load` and `merge` take it.
        context_length: What it was trained for, which none of the files says: 8192 for `Llama-2-7b-longlora-8k`. It
            makes the linear RoPE factor, as in the original.
        base_model: A folder or hub name, in place of the one that `adapter_config.json` names.
        finish: Called with the folder when all is written, before it appears under its name: to add to it.

    Raises:
        FileExistsError: The output folder holds something.
        FileNotFoundError: A file, or the base model, is missing.
        OSError: There is no room for it.
        ValueError: The files cannot be read, are incomplete or not finite, or do not fit the base model.
    """
    release, target = Path(release), Path(output_folder)
    refuse_to_overwrite(target)
    for name in ("adapter_config.json", _LORA):
        if not (release / name).is_file():
            raise FileNotFoundError(f"{release} has no {name}: it is no adapter of the original LongLoRA")
    base = base_of(release, base_model)
    with naming(str(release)):
        given: Any = PeftConfig.from_pretrained(str(release))
        lora = _named(load_pickled(release / _LORA))
        trained = _named(load_pickled(release / _TRAINED)) if (release / _TRAINED).is_file() else {}
    _check_finite(lora, _LORA)
    _check_finite(trained, _TRAINED)
    if other := obstacle(given):
        raise ValueError(f"{release} is no adapter of the original LongLoRA: it has {other}")
    with naming(f"the base model {base}"):
        config = AutoConfig.from_pretrained(base)
    config = extend_config(config, context_length)
    try:
        stored = StoredModel(config, weights_of_base(base), base)
    except NeedsWholeModel as reason:
        raise ValueError(f"cannot load the base model {base}: {reason}") from reason
    with naming(f"the base model {base}"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}  # a tied one once
    with naming(f"{release / _LORA} as adapter_config.json describes it"):
        _check_lora(lora, shapes, given, base)
    trained = {name: _fitted(name, weight, shapes.get(name), base) for name, weight in trained.items()}
    peft_config = LoraConfig(
        r=given.r,
        lora_alpha=given.lora_alpha,
        lora_dropout=given.lora_dropout,
        target_modules=given.target_modules,
        modules_to_save=sorted({name.split(".")[-2] for name in trained}) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=os.path.abspath(base) if os.path.isdir(base) else base,
        inference_mode=True,
        ensure_weight_tying=bool(stored.is_tied and trained),
    )
    frozen = {name: stored.get(name) for name in shapes if len(shapes[name]) == 2 and name not in trained}
    if parts := [name for name in frozen if name not in stored]:
        raise ValueError(f"cannot load the base model {base}: its files hold {min(parts)} in parts")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {  # PEFT looks for a tied weight under all of its names
        name: trained[names[id(parameter)]]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if names[id(parameter)] in trained
    }
    tensors = {
        PREFIX + name: weight.to(torch.float32, copy=True).contiguous()
        for name, weight in (lora | trained | tied).items()
    }
    with appearing(target) as unfinished:
        save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
        peft_config.save_pretrained(str(unfinished))
        record = write_record(unfinished, config, fingerprint(frozen), tensors)
        write_card(unfinished, record, peft_config)
        if finish:
            finish(unfinished)


def _named(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of the base model, as far as there are such. The original's own scripts take the prefix off one of
    the two files."""
    return {name.removeprefix(PREFIX).replace(".default.", "."): weight for name, weight in weights.items()}


def _check_lora(lora: dict[str, torch.Tensor], shapes: dict[str, torch.Size], config: Any, base: str) -> None:
    for name, factor in lora.items():
        module, _, half = name.rpartition(".lora_")
        rows, columns = shapes.get(f"{module}.weight", (0, 0))
        want = {"A.weight": (config.r, columns), "B.weight": (rows, config.r)}.get(half)
        if not rows or tuple(factor.shape) != want:
            raise ValueError(f"{_LORA} does not fit {base}: {name} has size {list(factor.shape)}")
    modules = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    targets = [module for module in modules if check_target_module_exists(config, module)]
    missing = {module + factor for module in targets for factor in FACTORS} - lora.keys()
    if missing or not lora:
        raise ValueError(f"{_LORA} is incomplete: it has no {listed(missing) or 'weights'}")


def _check_finite(weights: dict[str, torch.Tensor], file: str) -> None:
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ValueError(f"{file} holds weights that are not finite: {listed(broken)}")


def _fitted(name: str, weight: torch.Tensor, shape: torch.Size | None, base: str) -> torch.Tensor:
    """The weight in the base model's shape: without the rows of tokens that were added to the vocabulary."""
    if shape is not None and len(shape) == 2 and weight.shape[1:] == shape[1:] and 0 < len(weight) - shape[0] <= _ADDED:
        _log.warning(
            "%s has %d rows, and the vocabulary of the base model %d tokens: what the original added, for padding, is "
            "left out", name, len(weight), shape[0],
        )  # fmt: skip
        return weight[: shape[0]]
    if weight.shape != shape:
        there = "has no such weight" if shape is None else f"has {list(shape)}"
        raise ValueError(f"{_TRAINED} does not fit {base}: {name} has size {list(weight.shape)}, and the model {there}")
    return weight
