"""Models of which only the layers with a sliding window have positions: a longer context is none of RoPE's concern."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, Cohere2Config, Exaone4Config, PreTrainedConfig

from longlora_ext.config import config_for, context_length, extend_config
from small_decoders import CONTEXT, small_config
from tiny_models import SIZES, tiny_model, tokens

MIXED: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
#: By their code, by the config's RoPE parameters (Beam), and by its thetas (Granite), whose others have positions.
ONLY_WINDOWS: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "cohere2": {},
    "exaone4": {},
    "exaone_moe": {},
    "flint": {},
    "kolibri1": {},
    "beam": {},
    "granite_swa": {"layer_rope_theta": [1e4, 0]},
    "granitemoe_swa": {"layer_rope_theta": [1e4, 0]},
}
KINDS = [kind for kind in ONLY_WINDOWS if kind in CONFIG_MAPPING]  # older versions of transformers lack some


def logits(config: PreTrainedConfig) -> torch.Tensor:
    model = tiny_model(config=config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens(1, 30)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays(kind: str) -> None:
    """What they do within the model's own context stays the same, by yarn as well."""
    config = small_config(kind, **MIXED, **ONLY_WINDOWS[kind])
    extended = extend_config(config, 4 * CONTEXT, rope_type="yarn")
    assert extended.rope_parameters == config.rope_parameters
    assert context_length(extended) == extended.max_position_embeddings == 4 * CONTEXT
    assert torch.equal(logits(config), logits(extended))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not ONLY_WINDOWS[kind] and kind != "beam"])
def test_full_layers_of_these_have_no_positions(kind: str) -> None:
    """So their code says, not their config: a theta changes nothing."""
    full = {"layer_types": ["full_attention"] * 2}
    each = [{"rope_type": "default", "rope_theta": theta} for theta in (10.0, 1e4)]
    assert torch.equal(*(logits(small_config(kind, **full, rope_parameters=rope)) for rope in each))


@pytest.mark.parametrize("kind", [Cohere2Config, Exaone4Config])
def test_it_is_scaled_where_no_layer_has_a_window(kind: type[PreTrainedConfig]) -> None:
    all_see_all = kind(**SIZES, sliding_window=None, layer_types=["full_attention"] * 2)
    assert extend_config(all_see_all, 256, rope_type="yarn").rope_parameters["factor"] == 4


@pytest.mark.skipif("granite_swa" not in CONFIG_MAPPING, reason="this transformers has no such model")
def test_it_is_scaled_where_some_full_layer_has_positions() -> None:
    layers = {"layer_types": MIXED["layer_types"] * 2, "layer_rope_theta": [1e4, 0, 1e4, 1e4], "num_hidden_layers": 4}
    assert extend_config(small_config("granite_swa", **layers), 4 * CONTEXT).rope_parameters["factor"] == 4


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
def test_it_stays_scaled_as_it_is(rope_type: str) -> None:
    """EXAONE 4's is, by llama3. It could not be extended: "pass rope_type='llama3'", also where that was passed."""
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0}
    if rope_type in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = 16
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = Exaone4Config(**SIZES, sliding_window=16, **MIXED, rope_parameters=rope)
    config.s2attn_context_length = 64
    for each in (extend_config(config, 256, rope_type=rope_type), extend_config(config, 256), config_for(config, 256)):
        assert each.rope_parameters == config.rope_parameters and context_length(each) == 256
        assert each.max_position_embeddings == (64 if rope_type == "dynamic" else 256)
        assert extend_config(each, 512).rope_parameters == config.rope_parameters
