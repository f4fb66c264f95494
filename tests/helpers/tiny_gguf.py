"""A model folder as a GGUF file, as llama.cpp's converter writes a Llama; and a small one to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType
from gguf.quants import quantize
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import evaluate
from app.models.use_model import open_model
from app.runs.command_line import TINY_LLAMA

TENSORS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def save_small(folder: Path, tokens: int = 512) -> Path:
    """Write the tiny Llama with the first of its 2,048 tokens: who opens a GGUF file reads all of them, each time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY_LLAMA), AutoTokenizer.from_pretrained(TINY_LLAMA)
    model.resize_token_embeddings(tokens)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = {token: id for token, id in state["model"]["vocab"].items() if id < tokens}
    merges = [pair for pair in state["model"]["merges"] if "".join(pair) in vocab]
    state["model"] |= {"vocab": vocab, "merges": merges}
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(state)).model
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


def save_gguf(
    model: Path,
    file: Path,
    leave_out: str | None = None,
    quantised: bool = False,
    pre: str = "gpt-2",
    add_bos: bool | None = None,
) -> Path:
    """Write the model of a folder.

    Args:
        model: The folder.
        file: The file to write.
        leave_out: A tensor's name in the file, for one that is broken.
        quantised: Keep matrices in 8 bits (Q8_0), otherwise all is float32.
        pre: What the file calls the way in which text is split.
        add_bos: Whether text begins with BOS; None: the file does not say it.
    """
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    config = loaded.config
    writer = GGUFWriter(file, "llama")
    writer.add_name(model.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _write_scaling(writer, config)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    for name, weight in loaded.state_dict().items():
        array = weight.float().numpy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            module, _, kind = rest.rpartition(".")
            target = f"blk.{layer}.{TENSORS[module]}.{kind}"
            if module in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in module else config.num_key_value_heads
                # llama.cpp rotates neighbours, transformers the two halves of a head.
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        else:
            target = f"{OUTSIDE[name.removesuffix('.weight')]}.weight"
            if target == "output.weight" and config.tie_word_embeddings:
                continue
        if target != leave_out:
            kind = GGMLQuantizationType.Q8_0 if quantised and array.ndim == 2 else GGMLQuantizationType.F32
            writer.add_tensor(target, quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_scaling(writer: GGUFWriter, config: Any) -> None:
    """How RoPE is scaled."""
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = rope["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy(), raw_dtype=GGMLQuantizationType.F32)
    elif rope["rope_type"] != "default":
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)


def open_for_evaluation(*given: object) -> Any:
    """What `evaluate.py` opens."""
    options = evaluate.parse(["perplexity", *map(str, given)])
    return open_model(options, options.attention)


def logits(model: Any) -> torch.Tensor:
    """Of some tokens."""
    with torch.no_grad():
        return model(torch.arange(2, 60)[None]).logits
