"""Fine-tuning an extended model: LoRA with trainable embedding and norms, or all weights; save, load, merge.

    model = prepare_model(model, lora_config(model))     # or prepare_model(model, None): full fine-tuning
    ...                                                  # train, with or without DeepSpeed
    save_adapter(model, "adapter", tokenizer)            # LoRA + embedding + norms + RoPE + group size
    model = load("adapter")                              # the extended model, ready to generate
    merge("adapter", "merged")                           # a plain model folder

An adapter's folder holds all that is needed to use it beside the base model.
"""

# What trains: _prepare.py, with _targets.py, _norms.py, _tying.py, and _precision.py (in fp32).
# The folder: _save.py, _load.py, _record.py (longlora.json), _config_file.py, _checkpoint.py (weight files),
# _tokenizer.py, _generation.py, _card.py.
# Merging: _merge.py, with _lora.py and _stored.py (weight by weight). The original's adapters: _import.py.

from longlora_ext.adapter._generation import stop_at, stops
from longlora_ext.adapter._import import import_longlora
from longlora_ext.adapter._load import load, load_base
from longlora_ext.adapter._merge import merge
from longlora_ext.adapter._prepare import lora_config, prepare_model
from longlora_ext.adapter._save import save_adapter
from longlora_ext.adapter._tying import is_tied

__all__ = [
    "import_longlora",
    "is_tied",
    "load",
    "load_base",
    "lora_config",
    "merge",
    "prepare_model",
    "save_adapter",
    "stop_at",
    "stops",
]
