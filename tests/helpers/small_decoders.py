"""A small config of every causal decoder that transformers has."""

import copy
import inspect
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CONTEXT, WINDOW, VOCABULARY = 32, 12, 61
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT // 8,
}

#: What makes a config small, where it has such a field.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # attention weights far from uniform, so that a wrong mask shows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "router_hidden_size": 16,
    # attention with latent keys and values
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_layers": 2,
    # state spaces, linear attention, convolution
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_d_head": 32,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # Gemma 3n and 4
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
}

#: What single ones need besides.
_LATENT = {"num_key_value_heads": 4}  # of latent keys and values every head has its own
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": CONTEXT // 2}
OWN: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": LLAMA3},
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": _LATENT,
    "bamba": {"attn_layer_indices": [1], "mamba_expand": 2},
    "codegen": {"rotary_dim": 8, "n_positions": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 10000.0} for name in ("full_attention", "sliding_attention")
        },
        **_MIXED,
    },
    "cwm": {"rope_parameters": LLAMA3},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": {**_LATENT, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "doge": {"sliding_window": None},
    "dots3_note_text": {
        **_LATENT,
        "head_dim": 32,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 8,
        "shared_experts_intermediate_size": 32,
        "per_layer_config": {},
    },
    "gemma4_text": {**_MIXED, "global_head_dim": 32},
    "gemma4_unified_text": {**_MIXED, "global_head_dim": 32, "use_bidirectional_attention": None},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": {**_LATENT, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8},
    "gpt_oss": {"rope_parameters": _YARN},
    "gptj": {"rotary_dim": 8, "n_positions": 64},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
    },
    "hy_v4": {**_LATENT, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "hc_mult": 2},
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": WINDOW,
        "rel_extent": 16,
        "d_rel": 8,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 16},
    "laguna": _MIXED,
    "falcon_h1": {"mamba_d_ssm": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**_LATENT, "zero_expert_num": 2},
    "mellum": _MIXED,
    "minicpm3": _LATENT,
    "minimax": {"sliding_window": None},
    "minimax_m3_vl_text": {
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 32,
        "rotary_dim": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    "ministral": _MIXED,
    "ministral3": {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}},
    "nemotron_h": {"n_groups": 2, "chunk_size": 16},
    "phi3": {"original_max_position_embeddings": CONTEXT},
    "phimoe": {"original_max_position_embeddings": CONTEXT},
    "qwen4_exp_text": {
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
        "heads_per_ngram": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]},
    "roformer": {"embedding_size": 64, "is_decoder": True, "max_position_embeddings": 64},
    "zamba2": {
        "layer_types": ["linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "use_mem_rope": True,
        "chunk_size": 16,
    },
    "youtu": {**_LATENT, "pad_token_id": None},  # when it is loaded, its row of the embedding is set to 0
    "zaya": {"num_experts_per_tok": 1},
}

#: How RoPE is scaled where a model's code does not take "linear": Phi-3's knows LongRoPE alone. With one factor for all
#: frequencies, and no factor of the attention, that is the same.
_AS_LINEAR = {"short_factor": [4.0] * 8, "long_factor": [4.0] * 8, "attention_factor": 1.0}
ROPE: dict[str, dict[str, Any]] = {
    "phi3": {"rope_type": "longrope", "rope_parameters": _AS_LINEAR},
    "phimoe": {"rope_type": "longrope", "rope_parameters": {**_AS_LINEAR, "short_mscale": 1.0, "long_mscale": 1.0}},
}


#: Of which transformers itself cannot run a small one.
NOT_TRIED = ("zamba2",)


def kinds() -> list[str]:
    """The model types of all causal decoders with rotary positions: those of others cannot be extended."""
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING and _is_decoder(kind)]


def _class_of(kind: str) -> type[PreTrainedModel]:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    found: type[PreTrainedModel] = getattr(transformers, name if isinstance(name, str) else name[0])
    return found


def _is_decoder(kind: str) -> bool:
    source = inspect.getsource(inspect.getmodule(_class_of(kind)))  # type: ignore[arg-type]
    return "rotary" in source and not CONFIG_MAPPING[kind].sub_configs


def small_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """A config of that type, with these fields besides."""
    default = CONFIG_MAPPING[kind]()
    names = set(dir(default)) | set(default.attribute_map)
    computed = {name for name in dir(type(default)) if isinstance(getattr(type(default), name), property)}
    fields = {name: value for name, value in SMALL.items() if name in names - computed}
    mapped = default.attribute_map.get("layer_types", "layer_types")
    if isinstance(getattr(default, mapped, None), list) and mapped not in computed:
        types = sorted(set(getattr(default, mapped)))
        fields["layer_types"] = (types * 2)[: max(2, len(types))]
        fields["num_hidden_layers"] = len(fields["layer_types"])
    return CONFIG_MAPPING[kind](**{**fields, **copy.deepcopy(OWN.get(kind, {}) | changes)})


def plain_attention(kind: str) -> str:
    """The attention of transformers that ours is compared with."""
    return "sdpa" if _class_of(kind)._supports_sdpa else "eager"
