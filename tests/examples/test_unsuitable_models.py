"""Models that examples/finetune_llama.py refuses before it starts, and some that it takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import finetune_llama
from app.models import suitable
from finetune_runs import small_run
from longlora_ext.config import extend_config


def variant(model: Path, folder: Path, **config: object) -> Path:
    """A copy of a model with another config."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


UNSUITABLE = {
    "window": ({"model_type": "mistral", "sliding_window": 0}, "a sliding window of 0 tokens: set"),
    "chunks": ({"model_type": "llama4_text", "attention_chunk_size": 16}, "its attention is in chunks of 16 tokens"),
    "softcap": ({"attn_logit_softcapping": 30.0}, "caps its logits"),
    "dropout": ({"attention_dropout": 0.1}, 'set "attention_dropout": 0.0'),
    "vocabulary": ({"vocab_size": 100}, "the text has the token id 256, but the model's vocabulary has 100 tokens"),
    "shapes": ({"intermediate_size": 128}, "is [32, 64] in its files, and [32, 128] by its config"),
    "weights": ({}, "weights: Error while deserializing header"),
    "tokenizer": ({}, "the tokenizer of "),
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_an_unsuitable_model_is_one_clear_error(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    changes, message = UNSUITABLE[what]
    model = variant(inputs[0], tmp_path / what, **changes)
    if what == "weights":
        cut(model / "model.safetensors")
    if what == "tokenizer":
        for path in model.glob("token*"):
            path.unlink()
    with pytest.raises(SystemExit) as stopped:
        finetune_llama.main(small_run(model, inputs[1], tmp_path / "out"))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    said = [line for line in printed.err.splitlines() if line.startswith("finetune_llama.py: error: ")]
    assert len(said) == 1 and message in said[0]
    assert "measuring" not in printed.out


SIZES = {"num_hidden_layers": 4, "max_position_embeddings": 32, "hidden_size": 64, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16}
MIXED = ["sliding_attention", "full_attention"] * 2


WITH_WINDOWS: dict[str, list[dict]] = {
    "mistral": [{}],
    "mixtral": [{}],
    "starcoder2": [{}],
    "phi3": [{}],
    "ministral": [{}],
    "olmo3": [{}],
    "qwen2": [
        {"use_sliding_window": True, "max_window_layers": 1},
        {"use_sliding_window": True, "layer_types": MIXED},
    ],
    "qwen2_moe": [{"use_sliding_window": True}],
    "qwen3_moe": [{"use_sliding_window": True}],
    "gemma3_text": [{"layer_types": MIXED}],
    "cohere2": [{"layer_types": MIXED}],
    "exaone4": [{"layer_types": MIXED}],
}


@pytest.mark.parametrize(
    ("kind", "fields"), [(kind, fields) for kind, several in WITH_WINDOWS.items() for fields in several]
)
def test_models_with_a_sliding_window_are_suitable(kind: str, fields: dict) -> None:
    """And are extended and trained with it."""
    config = AutoConfig.for_model(kind, **SIZES, vocab_size=99, pad_token_id=0, sliding_window=16, **fields)
    for context in (None, 64):
        suitable.check_attention(config, context)
    # Phi-3 takes longrope alone, which with one factor for all frequencies is linear scaling.
    factors = {"short_factor": [2.0] * 8, "long_factor": [2.0] * 8, "attention_factor": 1.0}
    rope = {"rope_type": "longrope", "rope_parameters": factors} if kind == "phi3" else {}
    extended = extend_config(config, 64, **rope)
    assert extended.sliding_window == 16
    model = AutoModelForCausalLM.from_config(extended, attn_implementation="s2attn").train()
    model(torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
    grads = [weight.grad for name, weight in model.named_parameters() if "q_proj" in name or "qkv_proj" in name]
    assert grads and all(grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.parametrize("layers, what", [(None, "null, or a number"), (MIXED, "a number")])
@pytest.mark.parametrize("window", [0, None])
def test_a_window_of_no_tokens_is_unsuitable(window: int | None, layers: list | None, what: str) -> None:
    kind = "mistral" if layers is None else "qwen3"
    config = AutoConfig.for_model(kind, **SIZES, use_sliding_window=True)
    config.sliding_window, config.layer_types = window, layers
    if layers is None and window is None:
        return suitable.check_attention(config)
    with pytest.raises(ValueError, match=rf'of {window} tokens: set "sliding_window": {what} of tokens'):
        suitable.check_attention(config)


def test_learned_sinks_are_suitable_and_chunks_are_not() -> None:
    suitable.check_attention(AutoConfig.for_model("gpt_oss", **SIZES))
    with pytest.raises(ValueError, match="in chunks of 16 tokens"):
        suitable.check_attention(AutoConfig.for_model("llama4_text", **SIZES, attention_chunk_size=16))


def test_a_model_whose_code_wants_a_window_that_no_layer_uses() -> None:
    """As after taking away layer_types and the window both."""
    fields = {**SIZES, "layer_types": ["full_attention"] * 4}
    with pytest.raises(ValueError, match=r'set "sliding_window": 4096, or any number, in its config.json'):
        suitable.check_attention(AutoConfig.for_model("olmo3", **fields, sliding_window=None))
    suitable.check_attention(AutoConfig.for_model("olmo3", **fields, sliding_window=4096))
