"""How a GGUF file scales RoPE, which transformers does not read of most models: it would take RoPE for unscaled.

llama.cpp writes linear and yarn scaling as fields of the file (`rope.scaling.*`), that of Llama 3.1 and 3.2 as a tensor
with a factor for each frequency (`rope_freqs.weight`), and longrope as two tensors (`rope_factors_*.weight`).
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import cached_file

from longlora_ext.config import rope_type_of

#: What the models with `rope_freqs.weight` have in common, beside the factor: 8 in Llama 3.1, 32 in Llama 3.2.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_model_config(source: str, gguf_file: str | None = None) -> PreTrainedConfig:
    """The config of a model folder, of a name on a hub, or of a GGUF file.

    Args:
        source: The folder or name.
        gguf_file: The file's name in it.

    Raises:
        ValueError: The file scales RoPE in a way that is not known here.
    """
    if gguf_file is None:
        return AutoConfig.from_pretrained(source)
    config = AutoConfig.from_pretrained(source, gguf_file=gguf_file)
    if (rope := _scaling(str(cached_file(source, gguf_file)), config)) is None:
        return config
    parameters: Any = config.rope_parameters
    if "rope_theta" not in parameters:
        raise ValueError(f"{gguf_file} scales RoPE, and its layers have several: use the model's own folder")
    if rope_type_of(config) == "default":
        config.rope_parameters = parameters | rope
    return config


@cache
def read_gguf(file: str) -> Any:
    """The fields and tensors of a GGUF file, as `gguf.GGUFReader` shows them."""
    from gguf import GGUFReader  # an extra, without which transformers has refused the file

    return GGUFReader(file)


def _scaling(file: str, config: PreTrainedConfig) -> dict[str, Any] | None:
    """`rope_parameters` but for theta, in transformers' words; `None` if RoPE is not scaled."""
    reader = read_gguf(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if any("rope_factors_" in name for name in tensors):
        raise ValueError(f"{file} scales RoPE by longrope, which is not read of GGUF files: use the model's own folder")
    if (freqs := tensors.get("rope_freqs.weight")) is not None and not np.all(freqs.data == 1):
        return _llama3(file, np.array(freqs.data, dtype=np.float64), config)
    prefix = f"{reader.fields['general.architecture'].contents()}.rope.scaling."
    said = {name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if prefix in name}
    kind, factor = said.pop("type", "linear"), said.pop("factor", 0.0)
    if kind == "none" or not factor:
        return None
    said.pop("finetuned", None)
    original = said.pop("original_context_length", None)
    rope: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        # As llama.cpp does where the file does not say it.
        rope["original_max_position_embeddings"] = original or config.max_position_embeddings
        for name in ("beta_fast", "beta_slow"):
            if (value := said.pop(f"yarn_{name}", None)) is not None:
                rope[name] = value
        attention = said.pop("attn_factor", 1.0) * said.pop("yarn_attn_factor", 1.0)
        if attention != 1:  # llama.cpp's is a multiple of yarn's own, transformers' the whole
            rope["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
        if said.get("yarn_ext_factor") == 1:
            said.pop("yarn_ext_factor")
    if kind not in ("linear", "yarn") or said:
        named = ", ".join([f"type {kind}", *said])
        raise ValueError(f"{file} scales RoPE in a way that is not known here ({named}): use the model's own folder")
    return rope


def _llama3(file: str, factors: np.ndarray, config: PreTrainedConfig) -> dict[str, Any]:
    """The parameters that give these factors: the largest is that of all long waves."""
    rope = {"rope_type": "llama3", "factor": round(float(factors.max()), 4), **LLAMA3}
    parameters: Any = config.rope_parameters
    if theta := parameters.get("rope_theta"):
        scaled = copy.deepcopy(config)
        scaled.rope_parameters = rope | {"rope_theta": theta}
        frequencies = ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")[0].double().numpy()
        expected = theta ** -(np.arange(len(frequencies)) / len(frequencies)) / frequencies
        if expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-3):
            return rope
    raise ValueError(f"{file} scales RoPE by factors (rope_freqs) that are not Llama 3's: use the model's own folder")
