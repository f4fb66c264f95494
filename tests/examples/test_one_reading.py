"""A question's answer and the nats of the right one are those of two readings, and the prompt is read once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen3NextConfig

from app.evaluation.answer_nats import answer_losses
from app.evaluation.one_reading import answer_and_losses
from tiny_models import SIZES, tiny_model, tokens

GREEDY = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
RIGHT = [7, 8, 9]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "windows, whose caches are cut": {"family": "mistral", "sliding_window": 16},
    "states that are written in place": {
        "dtype": torch.float32,  # its experts are multiplied in no other
        "config": Qwen3NextConfig(
            **{**SIZES, "num_hidden_layers": 4},
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
    },
    "dynamic RoPE": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
}


def opened(model: Any) -> Any:
    def forget() -> None:
        with torch.no_grad():
            model(torch.zeros((1, 1), dtype=torch.long), use_cache=False)

    return SimpleNamespace(model=model, forget_length=forget, description={"rope": model.config.rope_parameters})


@pytest.mark.parametrize("behind", [0, 2], ids=["whole", "the answer begins within the prompt"])
@pytest.mark.parametrize("kind", MODELS)
def test_one_reading_is_as_two(kind: str, behind: int) -> None:
    model = tiny_model(**{"attn_implementation": "eager", "dtype": torch.float64, **MODELS[kind]})
    asked, ids = opened(model), tokens(1, 100)[0].tolist()
    prompt = ids[: len(ids) - behind]
    asked.forget_length()
    losses, _ = answer_losses(model, prompt, RIGHT)
    asked.forget_length()
    given = torch.tensor([ids])
    said = model.generate(given, attention_mask=torch.ones_like(given), generation_config=GREEDY)[0, 100:].tolist()

    read: list[int] = []
    embeddings = model.get_input_embeddings()
    with_hook = embeddings.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].shape[1]))
    again, found = answer_and_losses(asked, ids, (prompt, RIGHT), GREEDY)
    with_hook.remove()
    assert again == said and len(said) == 6
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
    assert sum(count > 50 for count in read) == (1 if kind in ("llama", "windows, whose caches are cut") else 2)
