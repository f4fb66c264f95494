"""`merge`: base model and adapter as one plain model folder, written one shard after the other."""

from __future__ import annotations

import errno
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
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.logging import tqdm

from longlora_ext._errors import naming
from longlora_ext._folders import appearing, refuse_to_overwrite
from longlora_ext._lengths import possible_lengths
from longlora_ext.adapter._config_file import complete_config
from longlora_ext.adapter._generation import AsItIs, has_generation_config, keep_generation_config
from longlora_ext.adapter._load import HUB_ARGUMENTS, base_of, check_one_model, load, weights_of_base
from longlora_ext.adapter._lora import LoraWeights, NeedsWholeModel
from longlora_ext.adapter._record import apply_record, check_shape, check_tying, check_weights, read_record
from longlora_ext.adapter._stored import StoredModel
from longlora_ext.adapter._tokenizer import plain_tokenizer, save_tokenizer
from longlora_ext.adapter._tying import settle_tying, untie_adapted
from longlora_ext.config import CONFIG_FIELDS, context_length

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
    """Write base model and adapter as one plain model folder, which transformers loads with no code of ours.

    One shard at a time is in memory, and its tensors have the names that they have in the base model's files, whatever
    the model makes of them, such as one weight of the many experts of a mixture. Only an adapter that changes more than
    single tensors of the files (DoRA and the like), or a base model that is quantised, is merged by PEFT in the memory
    that the whole model takes; a line in the log says so, and why.

    RoPE stands in `config.json` under its older names as well (`rope_scaling`, `rope_theta`), for transformers 4 and
    others that know no `rope_parameters`.

    Args:
        folder: The adapter folder.
        output_folder: Must not exist, or be empty; it appears when it is complete. The tokenizer and
            `generation_config.json` come along, from the adapter folder or else from the base model, and what says how
            the adapter was made (`run.json`, `import.json`), if it is there.
        base_model: Where the base model is now, if not where it was in training.
        dtype: Of the merged weights. By default, and for `"auto"`, each keeps that of the base model.
        max_shard_size: Of a file, in bytes or as text (`"500MB"`); a weight that is larger has a file of its own.
        finish: Called with the folder when all is written, before it appears under its name: to add to it.
        hub_arguments: `revision`, `token`, `cache_dir` and the like, for a base model on the hub.

    Raises:
        FileExistsError: The output folder holds something.
        OSError: There is no room for it.
        ValueError: The folder holds a whole model, or one beside the adapter, or a weight is not finite;
            and what `load` raises.
    """
    folder, target = Path(folder), Path(output_folder)
    if unknown := set(hub_arguments) - set(HUB_ARGUMENTS):
        raise TypeError(f"merge() got an unexpected argument {min(unknown)!r}")
    dtype, shard_size = _dtype(dtype), _bytes(max_shard_size)
    refuse_to_overwrite(target)
    check_one_model(folder)
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
        tokenizer: Any = None
        if tokenizer_folder:
            found = AutoTokenizer.from_pretrained(tokenizer_folder, **hub_arguments)
            tokenizer = plain_tokenizer(found, tokenizer_folder, **hub_arguments)
    with appearing(target) as unfinished:
        if tokenizer:
            save_tokenizer(tokenizer, unfinished, read_record(folder)["context_length"])
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
    there, beyond which transformers scales. Then, and where a config could be taken for one of another length, the
    context stays in our field, which others pass over."""
    length = context_length(config)
    for name in CONFIG_FIELDS:
        if hasattr(config, name):
            delattr(config, name)
    if possible_lengths(config) != (length,) or length != config.max_position_embeddings:
        config.s2attn_context_length = length


def _by_peft(
    folder: Path, base: str, dtype: torch.dtype | None, max_shard_size: int, hub: dict[str, Any]
) -> Callable[[Path], None]:
    model: Any = load(folder, base_model=base, attn_implementation="sdpa", dtype=dtype or "auto", **hub)
    untie_adapted(model.get_base_model())
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except RuntimeError as error:
        raise ValueError(f"PEFT cannot merge {folder}: {error}") from error
    for name, weight in merged.state_dict().items():
        _check_finite(name, weight)
    _forget_ours(merged.config)
    settle_tying(merged)  # PEFT unties what it merges one half of
    keep_generation_config(merged)

    def write(output: Path) -> None:
        merged.save_pretrained(output, max_shard_size=max_shard_size)
        complete_config(output)

    return write


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
    apply_record(config, record)
    stored = StoredModel(config, weights, base, hub.get("trust_remote_code", False))
    if absent := [name for name in record["base_weights"] if name not in stored]:
        raise NeedsWholeModel(f"the base model's files have {min(absent)} in parts")
    check_weights(stored.get, record, base)
    check_tying(adapter.config, stored.is_tied, base)
    _forget_ours(config)
    if dtype is not None:
        config.dtype = dtype
    sources = _sources(stored, adapter)
    new = {name: _as(weights.like(name), dtype) for name in sources}
    plan = split_torch_state_dict_into_shards(new, max_shard_size=max_shard_size)

    def merged(name: str) -> torch.Tensor:
        weight, in_adapter = weights.get(name), sources[name]
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
        complete_config(output)
        _save_generation_config(str(folder) if has_generation_config(folder) else base, hub, output)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (output / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        with tqdm(total=len(new), desc="merging", unit="weight") as bar:
            for file, names in plan.filename_to_tensors.items():
                save_file({name: merged(name) for name in names}, output / file, metadata={"format": "pt"})
                weights.close()  # or what was read of it stays in memory
                bar.update(len(names))

    return write


def _save_generation_config(source: str, hub: dict[str, Any], output: Path) -> None:
    """That of the adapter folder, or of the base model. A model without has that of its config."""
    with naming(f"generation_config.json of {source}"):
        try:
            generation = AsItIs.from_pretrained(source, **hub)
        except OSError:
            return
    generation.save_pretrained(output)


def _as(weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A weight in that dtype, if both are numbers with a point."""
    return weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight


def _sources(stored: StoredModel, adapter: LoraWeights) -> dict[str, str | None]:
    """For each tensor of the merged files, which are named as the base model's, the name in the adapter if it
    changes."""
    sources = {}
    for file_name, name in stored.becomes.items():
        names = stored.names_of(name) if name is not None else ()
        changed = adapter.changed & set(names)
        if changed and len(names) > 1 and not adapter.ties(changed):
            raise NeedsWholeModel(f"the adapter changes {' and '.join(sorted(changed))}, one of the tied {list(names)}")
        sources[file_name] = min(changed, default=None)
    reached = {name for tensor in stored.becomes.values() if tensor is not None for name in stored.names_of(tensor)}
    if strangers := adapter.changed - reached:
        raise NeedsWholeModel(f"the adapter changes {min(strangers)}, which no tensor of the base model's files is")
    return sources
