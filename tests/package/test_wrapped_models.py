"""Models of which a text model is a part: refused by what they are, and the way out that docs/models.md names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    LlavaConfig,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen2AudioConfig,
)

from longlora_ext.config import config_for, context_length, extend_config
from tiny_models import SIZES, tokens
from tiny_training import save_base

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TEXT = {**SIZES, "pad_token_id": 0, "head_dim": 8}
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
MODELS: dict[str, Any] = {
    "gemma3": lambda: Gemma3Config(
        text_config={**TEXT, "sliding_window": 16}, vision_config={**EYES, "patch_size": 4}, mm_tokens_per_image=4
    ),
    "llava": lambda: LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**EYES, "patch_size": 4, "model_type": "clip_vision_model"},
    ),
}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (Gemma3Config, "gemma3_text"),
        (LlavaConfig, "llama"),
        (Mistral3Config, "mistral"),
        (Qwen2_5_VLConfig, "qwen2_5_vl_text"),
        (Qwen2AudioConfig, "qwen2"),
    ],
)
def test_models_that_wrap_a_text_model_are_refused_as_such(config: Any, text: str) -> None:
    said = rf"{config.__name__} wraps a text model \({text}\) with others: save the text model as a folder of its own"
    for asking in (context_length, config_for, lambda wrapped: extend_config(wrapped, 10**6)):
        with pytest.raises(ValueError, match=said):
            asking(config())


@pytest.mark.parametrize("kind", MODELS)
def test_the_text_model_becomes_a_folder_of_its_own(kind: str, tmp_path: Path) -> None:
    """By the code of the page, in another folder."""
    save_base(tmp_path / "whole")  # for its tokenizer
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(MODELS[kind]()).bfloat16().save_pretrained(tmp_path / "whole")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    code = found[1].replace("google/gemma-3-4b-it", str(tmp_path / "whole"))
    exec(code.replace("gemma-3-4b-text", str(tmp_path / "text")), {})
    ids = tokens(1, 40)
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert text.dtype == torch.bfloat16 and torch.equal(text(ids).logits, whole(ids).logits)
    config = AutoConfig.from_pretrained(tmp_path / "text")
    assert context_length(extend_config(config, 4 * context_length(config))) == 4 * context_length(config)


@pytest.mark.parametrize(("field", "wrong"), [("s2attn_context_length", "1024"), ("max_position_embeddings", 0)])
def test_the_field_that_is_wrong_is_named(field: str, wrong: object) -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    setattr(config, field, wrong)
    with pytest.raises(ValueError, match=f"config.{field} must be a positive integer, but it is {wrong!r}"):
        context_length(config)
