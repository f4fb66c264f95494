"""A question's answer and the nats of the right one are those of two readings, and the prompt is read once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from app.evaluation.answer_nats import answer_losses
from app.evaluation.one_reading import answer_and_losses
from app.models.suitable import check_attention
from every_decoder import LONGER
from longlora_ext.config import extend_config
from small_decoders import NOT_TRIED, VOCABULARY, kinds, plain_attention, small_config
from tiny_models import tiny_model

GREEDY = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
RIGHT = [7, 8, 9]
ONCE = ["llama", "mistral", "gemma3_text", "gpt_oss", "phi3", "olmo3", "qwen3_moe", "deepseek_v3"]
TWICE = ["qwen3_next", "falcon_h1", "minimax", "gemma2"]  # states, a cache of its own, logits that are capped


def opened(model: PreTrainedModel) -> Any:
    def forget() -> None:
        with torch.no_grad():
            model(torch.zeros((1, 1), dtype=torch.long), use_cache=False)

    return SimpleNamespace(model=model, base=model, forget_length=forget)


def check(model: PreTrainedModel, behind: int = 0) -> int:
    """One reading is as two. Returns how often the prompt was read.

    Args:
        model: In eval mode.
        behind: Tokens of the prompt that belong to the answer.
    """
    asked = opened(model)
    ids = torch.randint(3, VOCABULARY, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = ids[: len(ids) - behind]
    asked.forget_length()
    losses, _ = answer_losses(model, prompt, RIGHT)
    asked.forget_length()
    given = torch.tensor([ids])
    said = model.generate(given, attention_mask=torch.ones_like(given), generation_config=GREEDY)[0, 100:].tolist()
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, out: read.append(inputs[0].shape[-1]))
    again, found = answer_and_losses(asked, ids, (prompt, RIGHT), GREEDY)
    hook.remove()
    assert again == said and len(said) == 6
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-4)
    return sum(count > 50 for count in read)


@pytest.mark.parametrize("behind", [0, 2], ids=["whole", "the answer begins within the prompt"])
def test_one_reading_is_as_two(behind: int) -> None:
    assert check(tiny_model(dtype=torch.float64), behind) == 1
    assert check(tiny_model("mistral", sliding_window=16, dtype=torch.float64), behind) == 1


def small_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=plain_attention(config.model_type)).eval()


@pytest.mark.parametrize(("kind", "times"), [*((kind, 1) for kind in ONCE), *((kind, 2) for kind in TWICE)])
def test_who_keeps_more_than_keys_and_values_reads_twice(kind: str, times: int) -> None:
    assert check(small_model(small_config(kind))) == times


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_rope_that_depends_on_the_length_reads_twice(kind: str) -> None:
    """What was read would have other frequencies with the answer behind it. Gemma 3 has such in some of its layers."""
    assert check(small_model(extend_config(small_config(kind), LONGER, rope_type="dynamic"))) == 2


def test_phi_reads_twice_where_it_begins_anew() -> None:
    config = small_config("phi3", original_max_position_embeddings=99)
    assert check(small_model(config)) == 2


@pytest.mark.full
def test_one_reading_is_as_two_in_every_decoder() -> None:
    once = 0
    for kind in sorted({*kinds()} - {*NOT_TRIED}):
        config = small_config(kind)
        try:
            check_attention(config)
        except ValueError:
            continue  # and reads twice
        try:
            once += check(small_model(config)) == 1
        except Exception as error:
            raise AssertionError(kind) from error
    assert once > 60
