"""Every causal decoder of transformers, small: it runs as docs/models.md says, or is refused with the reason there."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    LlamaForCausalLM,
)

import longlora_ext.attention  # noqa: F401
from app.models.suitable import check_attention
from every_decoder import verdict
from longlora_ext import extend_config
from longlora_ext.parallel import check_sequence_parallel
from small_decoders import CONTEXT, LLAMA3, kinds, small_config

DOCS = Path(__file__).parents[2] / "docs"
PINNED = "5.23.0"  # requirements.txt: other versions have other models

NAMED = ["gemma3_text", "gpt_oss", "qwen3", "qwen3_moe", "mixtral", "olmo2", "olmo3", "phi3", "gpt_neox", "smollm3",
         "granite"]  # fmt: skip
OTHERS = ["deepseek_v3", "falcon", "deepseek_v32", "lfm2", "doge", "gemma4_text"]

pytestmark = pytest.mark.skipif(transformers.__version__ != PINNED, reason="docs/models.md is of another version")


def make_models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_models", DOCS / "make_models.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", [*NAMED, *OTHERS])
def test_a_model_does_what_the_page_says(kind: str) -> None:
    found = verdict(kind)
    assert make_models().line(kind, found) in (DOCS / "models.md").read_text()
    assert kind not in NAMED or not found.refusal


def test_llama_3_x() -> None:
    """Whose RoPE is scaled already."""
    assert not verdict("llama", rope_parameters=LLAMA3).refusal


def test_gemma_4_of_31b() -> None:
    """Whose full layers have other heads than those with a window: larger, and fewer of keys, which are values too."""
    assert not verdict("gemma4_text", attention_k_eq_v=True, num_global_key_value_heads=1).refusal


def test_heads_of_all_layers_are_to_be_divided_where_processes_share_sequences() -> None:
    gemma = small_config("gemma4_text", num_attention_heads=6, attention_k_eq_v=True, num_global_key_value_heads=3)
    check_sequence_parallel(gemma, 3, "halo")
    with pytest.raises(ValueError, match="2 ranks do not divide 6 query heads and 3 key and value heads"):
        check_sequence_parallel(gemma, 2, "ulysses")  # nor the full layers', though 2 divide those of the others


def test_laguna_whose_layers_differ_in_query_heads() -> None:
    """It was refused for heads that are "split over ranks". Of each layer's the second half is shifted."""
    assert not verdict("laguna", num_attention_heads_per_layer=[4, 2]).refusal


@pytest.mark.full
def test_the_page_is_current() -> None:
    verdicts = {kind: verdict(kind) for kind in kinds()}
    assert make_models().page(verdicts) == (DOCS / "models.md").read_text(), "run python docs/make_models.py"
    assert sum(not found.refusal for found in verdicts.values()) >= 90


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (FalconConfig, {}),
        (GPTNeoConfig, {"attention_types": [[["global", "local"], 1]]}),
        (GPTJConfig, {"rotary_dim": 8}),
        (BloomConfig, {}),
        (CodeGenConfig, {"rotary_dim": 8}),
    ],
)
def test_attention_that_is_not_reached_is_refused(config: type, fields: dict[str, Any]) -> None:
    """The first three ended in KeyError 's2attn', the last two trained with dense attention of their own."""

    def small() -> Any:
        return config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=61, **fields)

    with pytest.raises(ValueError, match="does not reach the attention of"):
        AutoModelForCausalLM.from_config(small(), attn_implementation="s2attn")
    with pytest.raises(ValueError, match=f"does not reach the attention of {config.__name__[:4]}"):
        check_attention(small())
    AutoModelForCausalLM.from_config(small())  # with another attention that is none of our business


def test_models_that_carry_one_of_ours_are_not_refused() -> None:
    """A class of one's own over Llama, in a module that knows nothing of attention."""

    class Mine(LlamaForCausalLM):
        pass

    Mine._from_config(small_config("llama"), attn_implementation="s2attn")


def test_rope_of_layers_with_a_window_stays() -> None:
    gemma = extend_config(small_config("gemma3_text"), 4 * CONTEXT)
    assert (
        gemma.rope_parameters["sliding_attention"] == small_config("gemma3_text").rope_parameters["sliding_attention"]
    )
    assert gemma.rope_parameters["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
    assert extend_config(gemma, 8 * CONTEXT).rope_parameters["full_attention"]["factor"] == 8.0
    wide = small_config("gemma3_text", sliding_window=4 * CONTEXT)
    with pytest.raises(ValueError, match="different RoPE parameters for different layers"):
        extend_config(wide, 4 * CONTEXT)  # its windows hold all tokens: they too would be at new positions
    assert extend_config(wide, 5 * CONTEXT)


def test_rope_that_scales_all_frequencies_multiplies() -> None:
    """Gemma 4's full layers have the type "proportional", scaled or not."""
    gemma = small_config("gemma4_text")
    once = extend_config(gemma, 4 * CONTEXT, rope_type="proportional")
    assert once.rope_parameters["full_attention"]["factor"] == 4.0
    twice = extend_config(once, 8 * CONTEXT, rope_type="proportional")
    assert twice.rope_parameters["full_attention"]["factor"] == 8.0
    assert torch.equal(torch.tensor(gemma.rope_parameters["sliding_attention"]["rope_theta"]), torch.tensor(1e4))


def test_rope_is_that_of_the_heads_of_the_full_layers() -> None:
    """Gemma 4's have twice the dimensions of the others: reading `head_dim` was an error of no words of ours."""
    ropes = {name: {"rope_type": "default", "rope_theta": 1e4} for name in ("full_attention", "sliding_attention")}
    gemma = small_config("gemma4_text", global_head_dim=32, rope_parameters=ropes)
    rope = extend_config(gemma, 4 * CONTEXT, rope_type="ntk").rope_parameters
    assert rope["full_attention"]["rope_theta"] == pytest.approx(1e4 * 4 ** (32 / 30))
    assert rope["sliding_attention"] == ropes["sliding_attention"]
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}  # one for two dimensions
    assert extend_config(gemma, 4 * CONTEXT, rope_type="longrope", rope_parameters=factors)
    with pytest.raises(ValueError, match="do not fit rope_type 'longrope'"):
        wrong = {name: values[:8] for name, values in factors.items()}
        extend_config(gemma, 4 * CONTEXT, rope_type="longrope", rope_parameters=wrong)
    kept = extend_config(gemma, 4 * CONTEXT).per_layer_config
    assert [layer.head_dim for layer in kept] == [16, 32]
