"""Every causal decoder of transformers, small, and what becomes of it: it runs, or why not.

`verdict(kind)` builds one with random weights, and lets it do all that a training does. What a model cannot do must be
refused in words before it starts; anything else is an exception of this module's callers to deal with.
"""

import copy
import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from app.models.suitable import check_attention
from longlora_ext import check_documents_apart, load, lora_config, merge, prepare_model, save_adapter
from longlora_ext.attention import NAME, s2attn_forward
from longlora_ext.config import config_for
from longlora_ext.reference import s2attn_reference

CONTEXT, LONGER, GROUP, WINDOW, LENGTH, VOCABULARY = 32, 128, 16, 12, 40, 61

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
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT // 8,
}
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
    "gemma4_text": {**_MIXED, "per_layer_config": {}},
    "gemma4_unified_text": {**_MIXED, "per_layer_config": {}, "use_bidirectional_attention": None},
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


@dataclass(frozen=True)
class Verdict:
    """What became of a model.

    Attributes:
        refusal: Why it cannot be trained, as the user is told; empty if it runs.
        programs: Why finetune_llama.py does not train it, though what it is made of might.
        layers: How many of its layers computed S2-Attn, and of how many.
        rows: "packed" if documents may share rows, "padded" if each must have its own.
    """

    refusal: str = ""
    programs: str = ""
    layers: tuple[int, int] = (0, 0)
    rows: str = "packed"


def verdict(kind: str, **changes: Any) -> Verdict:
    """Build the model, extend it, train it, save and load and merge it. Anything unforeseen is an error of its own.

    Args:
        kind: Its type.
        changes: Fields of its config.
    """
    if kind in NOT_TRIED:
        return Verdict(refusal="not tried: transformers itself does not run a small one")
    config = small_config(kind, **changes)
    programs = ""
    try:
        check_attention(config, LONGER)
    except ValueError as error:
        programs = str(error)
    try:
        extended = config_for(config, LONGER, group_size=GROUP, **ROPE.get(kind, {}))
        model = _built(extended, NAME)
        lora_config(model)
        rows = _rows(model)
    except ValueError as error:
        return Verdict(refusal=str(error), programs=programs)
    _check_dense(model, extended)
    layers = _check_s2(model)
    if rows == "packed":
        _check_packed(model)
    with tempfile.TemporaryDirectory() as folder:
        _check_adapter(config, extended, Path(folder))
    return Verdict(programs=programs, layers=layers, rows=rows)


def _rows(model: PreTrainedModel) -> str:
    """Whether documents may share rows. What a layer cannot compute is refused here, too."""
    model.config.use_cache = False  # as the Trainer has it: with a KV cache some layers learn of no documents
    try:
        check_documents_apart(model)
    except ValueError:
        check_documents_apart(model, packed=False)
        return "padded"
    finally:
        model.config.use_cache = True
    return "packed"


def plain_attention(kind: str) -> str:
    """The attention of transformers that ours is compared with."""
    return "sdpa" if _class_of(kind)._supports_sdpa else "eager"


def _built(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """The same weights, whatever the attention. In eval mode."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()


def _ids(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def _close(actual: Tensor, expected: Tensor, what: str) -> None:
    scale = expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    assert error <= 1e-4 * max(scale, 1e-3), f"{what}: off by {error:.3g} of {scale:.3g}"


def _check_dense(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Eval is what transformers' own attention computes, also of padded rows, and with a KV cache."""
    plain = _built(config, plain_attention(config.model_type))
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        _close(model(_ids()).logits, plain(_ids()).logits, "dense evaluation")
        both = [m.generate(_ids(), max_new_tokens=6, min_new_tokens=6, do_sample=False) for m in (model, plain)]
    assert torch.equal(*both), "greedy generation differs"


@dataclass
class Call:
    """What one attention layer was called with, and what it returned."""

    module: Any
    q: Tensor
    k: Tensor
    v: Tensor
    keywords: dict[str, Any]
    out: Tensor


@contextmanager
def _listening() -> Iterator[list[Call]]:
    """Keep what the attention layers compute."""
    calls: list[Call] = []

    def listen(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **keywords: Any) -> Any:
        out, weights = s2attn_forward(module, q, k, v, attention_mask, **keywords)
        calls.append(Call(module, q, k, v, keywords, out))
        return out, weights

    AttentionInterface.register(NAME, listen)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, s2attn_forward)


def _check_s2(model: PreTrainedModel) -> tuple[int, int]:
    """In training each layer computes S2-Attn of its own q, k, v, by the definition. Returns how many layers do."""
    model.train()
    with torch.no_grad(), _listening() as calls:
        model(_ids(), use_cache=False)
    model.eval()
    assert calls, "no layer computed S2-Attn"
    for call in calls:
        q, k, v = (x.transpose(1, 2).double() for x in (call.q, call.k, call.v))
        window = _window_of(call)
        sinks = call.keywords.get("s_aux")
        expected, lse = s2attn_reference(q, k, v, GROUP, scale=call.keywords.get("scaling"), window=window)
        if sinks is not None:
            expected = expected * torch.sigmoid(lse - sinks.double()[None, :, None]).transpose(1, 2)[..., None]
        _close(call.out.double(), expected, f"S2-Attn in {type(call.module).__name__}")
    return len(calls), model.config.num_hidden_layers


def _window_of(call: Call) -> int | None:
    """The window of the layer, by what its model's config says of it."""
    config, layer = call.module.config, getattr(call.module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if types:
        return config.sliding_window if "sliding" in types[layer] else None
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def _check_packed(model: PreTrainedModel) -> None:
    """Documents in one row get the logits that they get alone."""
    lengths = (17, 9, 14)
    rows = [_ids(length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            together = model(torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits
            alone = torch.cat([model(row, use_cache=False).logits for row in rows], dim=1)
        _close(together, alone, "documents packed into one row")
    model.eval()


def _check_adapter(config: PreTrainedConfig, extended: PreTrainedConfig, folder: Path) -> None:
    """Two steps change it; saved and loaded it is the same, and merged as well, without our attention."""
    _built(config, NAME).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", config=copy.deepcopy(extended), attn_implementation=NAME
    )
    with torch.no_grad():
        before = model.eval()(_ids(90)).logits
    prepared: Any = prepare_model(model, lora_config(model)).train()
    optimizer = torch.optim.AdamW([weight for weight in prepared.parameters() if weight.requires_grad], lr=1e-2)
    for step in range(2):
        loss = prepared(input_ids=_ids(90, seed=step), labels=_ids(90, seed=step), use_cache=False).loss
        assert loss.isfinite(), f"the loss is {loss.item()}"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, weight in prepared.named_parameters() if "lora_B" in name and not weight.any()]
    assert not still, f"not trained: {still[0]}"
    save_adapter(prepared, folder / "adapter")
    merge(folder / "adapter", folder / "merged")
    loaded = load(folder / "adapter", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(
        folder / "merged", attn_implementation=plain_attention(config.model_type)
    ).eval()
    with torch.no_grad():
        after = prepared.eval()(input_ids=_ids(90)).logits
        assert (after - before).abs().max() > 0.01 * before.abs().max(), "two steps changed nothing"
        _close(loaded(input_ids=_ids(90)).logits, after, "the adapter, loaded")
        _close(merged(_ids(90)).logits, after, "the merged model")
        both = [m.generate(input_ids=_ids(90), max_new_tokens=6, do_sample=False) for m in (loaded, merged)]
    assert torch.equal(*both), "greedy generation of the merged model differs"
