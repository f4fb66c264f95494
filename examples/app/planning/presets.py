"""The config that is planned for: of a model, or of one that is known without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from app.models.folders import check_model_folder
from app.models.gguf_rope import read_model_config
from app.models.source import check_config, find_model

_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8, "rope_theta": 500000.0}
#: Configs that are known without a hub: width, width of the MLP, layers, heads, and the rest.
PRESETS: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "llama-2-7b": (4096, 11008, 32, 32, _LLAMA_2),
    "llama-2-13b": (5120, 13824, 40, 40, _LLAMA_2),
    "llama-2-70b": (8192, 28672, 80, 64, {**_LLAMA_2, "num_key_value_heads": 8}),
    "llama-3-8b": (4096, 14336, 32, 32, _LLAMA_3),
    "llama-3-70b": (8192, 28672, 80, 64, _LLAMA_3),
}


def read_config(model: str, gguf_file: str | None = None) -> PreTrainedConfig:
    """The config of what `--model` names, and perhaps `--gguf_file` in it."""
    if model.lower() in PRESETS and not Path(model).exists():
        hidden, intermediate, layers, heads, rest = PRESETS[model.lower()]
        return LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            **rest,
        )
    if not model.endswith(".json"):
        model, gguf_file = find_model(model, gguf_file)
        check_model_folder(model)
    check_config(model, gguf_file)
    return read_model_config(model, gguf_file)
