"""A model in a GGUF file as an ordinary model folder, which everything after the training can load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def convert_gguf(source: str, gguf_file: str, folder: Path, dtype: torch.dtype) -> str:
    """Write the model and tokenizer of a GGUF file as a folder, unless that is there. Collective.

    Args:
        source: The folder (or hub repository) with the file.
        gguf_file: The file's name in it.
        folder: The folder to write. It appears when it is complete.
        dtype: The dtype of the weights, which are expanded.

    Returns:
        The folder's absolute path.
    """
    state = PartialState()
    if state.is_main_process and not folder.exists():
        scratch = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(scratch, ignore_errors=True)
        # Newer versions of transformers must be told to expand the weights; older ones do nothing else.
        config = getattr(transformers, "GgufConfig", None)
        expand = {"quantization_config": config(dequantize=True)} if config else {}
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=dtype, **expand)
        # A model out of a GGUF file counts as quantized and cannot be saved; its weights in a new model can.
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, gguf_file=gguf_file), dtype=dtype)
        plain.load_state_dict(packed.state_dict())
        plain.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(scratch)
        os.replace(scratch, folder)
    state.wait_for_everyone()
    return str(folder.resolve())
