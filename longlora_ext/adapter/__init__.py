"""Fine-tuning an extended model: LoRA with trainable embedding and norms, or all weights; save, load, merge.

    model = prepare_model(model, lora_config(model))     # or prepare_model(model, None): full fine-tuning
    ...                                                  # train, with or without DeepSpeed
    save_adapter(model, "adapter", tokenizer)            # LoRA + embedding + norms + RoPE + group size
    model = load("adapter")                              # the extended model, ready to generate
    merge("adapter", "merged")                           # a plain model folder

In this room: `_prepare.py` and `_precision.py` (what trains, in fp32), `_save.py`, `_record.py` (longlora.json),
`_load.py`, `_merge.py` with `_lora.py` and `_stored.py` (weight by weight), and `_import.py` (the original's adapters).
"""

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
