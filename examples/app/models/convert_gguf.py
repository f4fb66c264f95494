"""A model in a GGUF file: to use as it is, or as an ordinary model folder, which everything after a training loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from app.models.gguf_rope import read_model_config
from app.models.tokenizer import read_tokenizer
from longlora_ext._folders import appearing
from longlora_ext._processes import on_first_process
from longlora_ext.adapter import load_base


def load_gguf(
    source: str, gguf_file: str, config: PreTrainedConfig, dtype: torch.dtype, **from_config_kwargs: Any
) -> PreTrainedModel:
    """
    The model of a GGUF file, its weights expanded.

    Args:
        source: The folder (or hub repository) with the file.
        gguf_file: The file's name in it.
        config: The file's, or what was made of it.
        dtype: The dtype of the weights.
        from_config_kwargs: For `AutoModelForCausalLM.from_config`.

    Raises:
        ValueError: The file cannot be read, or lacks weights.
    """
    # Newer versions of transformers must be told to expand the weights; older ones do nothing else.
    kind = getattr(transformers, "GgufConfig", None)
    expand = {"quantization_config": kind(dequantize=True)} if kind else {}
    packed = load_base(source, what=f"{gguf_file} in", gguf_file=gguf_file, dtype=dtype, **expand)
    # A model out of a GGUF file counts as quantized and cannot be saved; its weights in a new model can.
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **from_config_kwargs)
    plain.load_state_dict(packed.state_dict())
    plain.generation_config = packed.generation_config
    return plain


def convert_gguf(source: str, gguf_file: str, folder: Path, dtype: torch.dtype) -> str:
    """Write the model and tokenizer of a GGUF file as a folder, unless that is there. Collective.

    Args:
        source: The folder (or hub repository) with the file.
        gguf_file: The file's name in it.
        folder: The folder to write. It appears when it is complete.
        dtype: The dtype of the weights, which are expanded.

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: The file cannot be read, or lacks weights.
    """

    def convert() -> None:
        if folder.exists():
            return
        with appearing(folder) as unfinished:
            config = read_model_config(source, gguf_file)
            load_gguf(source, gguf_file, config, dtype).save_pretrained(unfinished)
            read_tokenizer(source, gguf_file).save_pretrained(unfinished)

    on_first_process(convert)
    return str(folder.resolve())
