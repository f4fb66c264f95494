"""`merge`: base model and adapter as one plain model folder, written one shard after the other."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.logging import tqdm

from longlora_ext._checkpoint import Checkpoint
from longlora_ext._folders import appearing, refuse_to_overwrite
from longlora_ext._generation import AsItIs, keep_generation_config
from longlora_ext._load import HUB_ARGUMENTS, base_of, load, naming, weights_of_base
from longlora_ext._lora import LoraWeights, NeedsWholeModel
from longlora_ext._record import apply_record, check_shape, check_weights, read_record
from longlora_ext.context import CONFIG_FIELDS, context_length

#: What the programs that make an adapter write into its folder about that.
MANIFESTS = ("run.json", "import.json")

_log = logging.getLogger(__name__)


def merge(
    folder: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    finish: Callable[[Path], None] | None = None,
    **hub_arguments: Any,
) -> None:
    """
    Write base model and adapter as one plain model folder, which transformers loads with no code of ours.

    One shard at a time is in memory. Only an adapter that changes more than single weights (DoRA and the like), or a
    base model whose files hold other tensors than the model has (quantised ones), is merged by PEFT in the memory
    that the whole model takes; a line in the log says so, and why.

    Args:
        folder (`str` or `os.PathLike`):
            The adapter folder.
        output_folder (`str` or `os.PathLike`):
            Must not exist, or be empty; it appears when it is complete. The tokenizer comes along, from the
            adapter folder or else from the base model, and what says how the adapter was made (`run.json`,
            `import.json`), if it is there.
        base_model (`str`, *optional*):
            Where the base model is now, if not where it was in training.
        dtype (`torch.dtype` or `str`, *optional*):
            Of the merged weights. By default, and for `"auto"`, each keeps that of the base model.
        max_shard_size (`int` or `str`, defaults to `"5GB"`):
            Of a file, in bytes or as text (`"500MB"`); a weight that is larger has a file of its own.
        finish (`Callable`, *optional*):
            Called with the folder when all is written, before it appears under its name: to add to it.
        hub_arguments:
            `revision`, `token`, `cache_dir` and the like, for a base model on the hub.

    Raises:
        `FileExistsError`: the output folder holds something.
        `OSError`: there is no room for it.
        `ValueError`: the folder holds a whole model, not an adapter, or a weight is not finite.
        And what [`load`] raises.
    """
    folder, target = Path(folder), Path(output_folder)
    if unknown := set(hub_arguments) - set(HUB_ARGUMENTS):
        raise TypeError(f"merge() got an unexpected argument {min(unknown)!r}")
    dtype, shard_size = _dtype(dtype), _bytes(max_shard_size)
    refuse_to_overwrite(target)
    if (folder / "config.json").is_file():
        raise ValueError(f"{folder} is a plain model folder already: there is nothing to merge")
    base = base_of(folder, base_model)
    try:
        write = _by_shards(folder, base, dtype, shard_size, hub_arguments)
    except NeedsWholeModel as reason:
        _log.warning("%s: the whole model is loaded into memory, and PEFT merges it", reason)
        write = _by_peft(folder, base, dtype, shard_size, hub_arguments)
    tokenizer_folder = _tokenizer_folder(folder, base)
    with naming(f"the tokenizer of {tokenizer_folder}"):
        tokenizer = tokenizer_folder and AutoTokenizer.from_pretrained(tokenizer_folder, **hub_arguments)
    with appearing(target) as unfinished:
        if tokenizer:
            tokenizer.save_pretrained(unfinished)
        for manifest in MANIFESTS:
            if (folder / manifest).is_file():
                shutil.copy(folder / manifest, unfinished)
        write(unfinished)
        if finish:
            finish(unfinished)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype, or `None` for those of the base model."""
    if dtype in (None, "auto"):
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype such as 'bfloat16', or 'auto', but it is {dtype!r}")
    return found


def _bytes(size: int | str) -> int:
    """A size that is given in bytes, or as text."""
    form = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", str(size).strip(), re.IGNORECASE)
    found = int(float(form[1]) * 1000 ** " KMGT".index(form[2].upper() or " ")) if form else 0
    if found < 1:
        raise ValueError(
            f"max_shard_size must be bytes, or a number with KB, MB, GB or TB like 5GB, but it is {size!r}"
        )
    return found


def _check_finite(name: str, weight: torch.Tensor) -> None:
    if not weight.isfinite().all():
        raise ValueError(f"{name} is not finite once it is merged, in {weight.dtype}")


def _tokenizer_folder(folder: Path, base: str) -> str | None:
    if (folder / "tokenizer_config.json").is_file():
        return str(folder)
    if os.path.isdir(base) and not os.path.isfile(os.path.join(base, "tokenizer_config.json")):
        return None
    return base


def _forget_ours(config: PreTrainedConfig) -> None:
    """Leave a plain config, whose context is `max_position_embeddings`. RoPE of the type "dynamic" needs the old length
    there, beyond which transformers scales: the new one then stays in our field, which others pass over."""
    length = context_length(config)
    for name in CONFIG_FIELDS:
        if hasattr(config, name):
            delattr(config, name)
    if length > config.max_position_embeddings:
        config.s2attn_context_length = length


def _by_peft(
    folder: Path, base: str, dtype: torch.dtype | None, max_shard_size: int, hub: dict[str, Any]
) -> Callable[[Path], None]:
    model: Any = load(folder, base_model=base, attn_implementation="sdpa", dtype=dtype or "auto", **hub)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except RuntimeError as error:
        raise ValueError(f"PEFT cannot merge {folder}: {error}") from error
    for name, weight in merged.state_dict().items():
        _check_finite(name, weight)
    _forget_ours(merged.config)
    keep_generation_config(merged)
    return functools.partial(merged.save_pretrained, max_shard_size=max_shard_size)


def _by_shards(
    folder: Path, base: str, dtype: torch.dtype | None, max_shard_size: int, hub: dict[str, Any]
) -> Callable[[Path], None]:
    """What writes the merged model; all that can be refused is refused before."""
    record = read_record(folder)
    adapter = LoraWeights(folder, record)
    with naming(f"the base model {base}"):
        config = AutoConfig.from_pretrained(base, **hub)
    check_shape(config, record, base)
    if getattr(config, "quantization_config", None) is not None:
        raise NeedsWholeModel("the base model's weights are quantised")
    weights = weights_of_base(base, **{name: hub[name] for name in hub if name != "trust_remote_code"})
    if absent := set(record["base_weights"]).difference(weights):
        raise NeedsWholeModel(f"the base model's files have no {min(absent)}")
    check_weights(weights.get, record, base)
    apply_record(config, record)
    _forget_ours(config)
    if dtype is not None:
        config.dtype = dtype
    with naming(f"the base model {base}"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=hub.get("trust_remote_code", False))
    sources = _sources(model, weights, adapter)
    new = {name: _like(weights.get(in_base), dtype) for name, (in_base, _) in sources.items()}
    plan = split_torch_state_dict_into_shards(new, max_shard_size=max_shard_size)

    def merged(name: str) -> torch.Tensor:
        in_base, in_adapter = sources[name]
        weight = weights.get(in_base)
        if in_adapter is not None:
            weight = adapter.merged(in_adapter, weight)
        weight = weight.to(new[name].dtype)
        _check_finite(name, weight)
        return weight

    def write(output: Path) -> None:
        room, needed = shutil.disk_usage(output).free, plan.metadata["total_size"]
        if room < needed:
            raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:,.1f} MB, and {room / 1e6:,.1f} MB are free")
        config.save_pretrained(output)
        _save_generation_config(base, hub, output)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (output / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        with tqdm(total=len(new), desc="merging", unit="weight") as bar:
            for file, names in plan.filename_to_tensors.items():
                save_file({name: merged(name) for name in names}, output / file, metadata={"format": "pt"})
                weights.close()  # or what was read of it stays in memory
                bar.update(len(names))

    return write


def _save_generation_config(base: str, hub: dict[str, Any], output: Path) -> None:
    """The base model's. A model without has that of its config."""
    with naming(f"generation_config.json of {base}"):
        try:
            generation = AsItIs.from_pretrained(base, **hub)
        except OSError:
            return
    generation.save_pretrained(output)


def _like(weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of that shape, and of that dtype if both are numbers with a point, without memory of its own."""
    changes = dtype is not None and weight.is_floating_point()
    return torch.empty(weight.shape, dtype=dtype if changes else weight.dtype, device="meta")


def _sources(model: PreTrainedModel, weights: Checkpoint, adapter: LoraWeights) -> dict[str, tuple[str, str | None]]:
    """For each weight of the merged model its name in the base model, and that in the adapter if it changes."""
    tied: dict[int, list[str]] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(weight), []).append(name)
    sources = {}
    for names in tied.values():
        changed = adapter.changed & set(names)
        if changed and len(names) > 1 and not adapter.ties(changed):
            raise NeedsWholeModel(f"the adapter changes {' and '.join(sorted(changed))}, one of the tied {names}")
        in_base = next((name for name in names if name in weights), None)
        if in_base is None:
            raise NeedsWholeModel(f"the base model's files have no {names[0]}")
        sources[names[0]] = in_base, min(changed, default=None)
    if strangers := adapter.changed.difference(*tied.values()):
        raise NeedsWholeModel(f"the adapter changes {min(strangers)}, which the model has not")
    return sources
