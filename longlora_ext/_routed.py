"""Models whose attention does not go through transformers' `AttentionInterface`: S2-Attn would never be asked."""

from __future__ import annotations

import sys

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

#: Words in the types of layers whose attention sees the tokens that an index picks, or summaries of them.
_PICKED = ("indexed", "sparse", "compressed")


def check_routed(model_class: type[PreTrainedModel]) -> None:
    """Raise `ValueError` if a class of models has attention of its own, which `attn_implementation` does not replace.

    Some of them end in a `KeyError` (Falcon, GPT-J, GPT-Neo), the others compute their own attention without a word
    (CodeGen, BLOOM, MPT, remote code of older days).
    """
    # Not all that go through it say so; those that do not lack the table in which it is looked up.
    parents = [parent for parent in model_class.__mro__ if issubclass(parent, PreTrainedModel)][:-1]
    if any(hasattr(sys.modules[parent.__module__], "ALL_ATTENTION_FUNCTIONS") for parent in parents):
        return
    if not model_class._supports_attention_backend:
        raise ValueError(
            f"attn_implementation='s2attn' does not reach the attention of {model_class.__name__}: its code does not "
            "go through transformers' AttentionInterface"
        )


def check_layer_types(config: PreTrainedConfig) -> None:
    """Raise `ValueError` if some layer's attention sees what an index picks, as DeepSeek V3.2's."""
    types = getattr(config, "layer_types", None) or ()
    if found := [kind for kind in types if any(word in kind for word in _PICKED)]:
        raise ValueError(
            f"attn_implementation='s2attn' cannot express attention to tokens that an index picks (layers of the type "
            f"{found[0]!r})"
        )


def check_class_of(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Refuse such a model as it is built for S2-Attn (torch's hook for modules that get a child)."""
    if isinstance(parent, PreTrainedModel) and parent.config._attn_implementation == "s2attn":
        check_routed(type(parent))
        check_layer_types(parent.config)
