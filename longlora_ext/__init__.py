"""Shifted short attention (S2-Attn) for extending the context of Llama-type models by LoRA fine-tuning.

Importing the package loads `torch.ops.longlora.s2attn` and nothing else; `longlora_ext.attention` puts it under
transformers, `longlora_ext.context` and `longlora_ext.adapter` extend and fine-tune a model with it.
"""

from longlora_ext.documents import doc_start_from_cu_seqlens, doc_start_from_mask, doc_start_from_position_ids
from longlora_ext.ops import s2attn
from longlora_ext.sinks import add_key, add_learned_sink

__all__ = [
    "add_key",
    "add_learned_sink",
    "doc_start_from_cu_seqlens",
    "doc_start_from_mask",
    "doc_start_from_position_ids",
    "s2attn",
]
