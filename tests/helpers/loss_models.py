"""Models whose loss is computed, and the memory that it takes."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CohereConfig, CohereForCausalLM, PreTrainedModel

from longlora_ext.adapter import lora_config, prepare_model
from op_checks import HALVES, default_dtype
from tiny_models import VOCABULARY, tiny_model


def model_of(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """With sdpa where the op has no kernels for the dtype: the loss is the same computation behind either."""
    attention = "s2attn" if default_dtype() == torch.float32 or dtype in HALVES else "sdpa"
    return tiny_model(family, attention, dtype, **changes)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators made and that are still there; `peak` is the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if torch.is_tensor(leaf):
                storage = StorageWeakRef(leaf.untyped_storage())
                self.live[storage.cdata] = storage, leaf.untyped_storage().nbytes()
        self.live = {key: (storage, size) for key, (storage, size) in self.live.items() if not storage.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return made


def prepared(case: str) -> PreTrainedModel | PeftModel:
    """A model as training has it; `case` is a few words of what it is."""
    family = "gemma" if "gemma" in case else "llama"
    dtype = torch.bfloat16 if "bf16" in case else torch.float32
    model = model_of(family, dtype, **({"tie_word_embeddings": True} if "tied" in case else {}))
    if "adapter" not in case:
        return prepare_model(model, None)
    changes: dict[str, Any] = {}
    if "lora head" in case:
        changes = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]}
    if "saved head" in case:
        changes = {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    return prepare_model(model, lora_config(model, **changes))


def cohere() -> CohereForCausalLM:
    return CohereForCausalLM(
        CohereConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            logit_scale=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
