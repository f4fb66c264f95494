"""The context extension: what is written into the config, and what a model makes of it."""

import math

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longlora_ext.adapter._record import apply_record, read_record, write_record
from longlora_ext.config import CONFIG_FIELDS, config_for, context_length, extend_config, group_size, rope_type_of
from tiny_models import tiny_config

LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 32,
}


def base(**changes: object) -> LlamaConfig:
    """A Llama config with a context of 64 and heads of 8."""
    config = tiny_config("llama", **changes)
    del config.s2attn_group_size
    return config


def frequencies(config: PreTrainedConfig) -> torch.Tensor:
    return AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq


def plain_frequencies(dim: int = 8, theta: float = 10000.0) -> torch.Tensor:
    return theta ** -(torch.arange(0, dim, 2) / dim)


@pytest.mark.parametrize("context, factor", [(256, 4.0), (65, 2.0), (128, 2.0), (200, 4.0)])
def test_linear_scaling_is_that_of_the_paper(context: int, factor: float) -> None:
    config = base()
    extended = extend_config(config, context)
    assert extended.max_position_embeddings == context_length(extended) == context
    assert extended.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": factor}
    torch.testing.assert_close(frequencies(extended), plain_frequencies() / factor)
    assert config.max_position_embeddings == 64 and config.rope_parameters["rope_type"] == "default"
    assert not any(hasattr(config, field) for field in CONFIG_FIELDS)


def extended_by(rope_type: str) -> PreTrainedConfig:
    given = {"longrope": LONGROPE, "default": {"rope_theta": 5e5}}.get(rope_type)
    return extend_config(base(), 256, rope_type=rope_type, rope_parameters=given)


ROPE_TYPES = ["default", *(name for name in ROPE_INIT_FUNCTIONS if name != "default")]


def test_the_rope_types_of_the_documentation_are_there() -> None:
    assert {"linear", "dynamic", "yarn", "llama3", "longrope"} <= set(ROPE_TYPES)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_every_rope_type_comes_back_with_an_adapter(rope_type: str, tmp_path) -> None:
    extended = extended_by(rope_type)
    write_record(tmp_path, extended, {}, [])
    config = base()
    apply_record(config, read_record(tmp_path))
    config.validate_rope()
    assert config.rope_parameters == extended.rope_parameters
    assert context_length(config) == 256 and group_size(config) == 64
    assert torch.equal(frequencies(config), frequencies(extended))


def test_yarn_keeps_near_positions_and_scales_far_ones() -> None:
    config = extended_by("yarn")
    plain, found = plain_frequencies(), frequencies(config)
    assert found[0] == plain[0] and found[-1] == pytest.approx(plain[-1].item() / 4)
    assert bool((found <= plain).all()) and bool((found >= plain / 4).all())
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_llama3_scales_wavelengths_beyond_the_original_context() -> None:
    found, plain = frequencies(extended_by("llama3")), plain_frequencies()
    wavelengths = 2 * math.pi / plain
    assert torch.equal(found[wavelengths < 64 / 4], plain[wavelengths < 64 / 4])
    torch.testing.assert_close(found[wavelengths > 64], plain[wavelengths > 64] / 4)
    assert bool((wavelengths < 16).any()) and bool((wavelengths > 64).any())


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_every_rope_type_is_saved_with_the_model(rope_type: str, tmp_path) -> None:
    extended = extended_by(rope_type)
    assert extended.rope_parameters["rope_type"] == rope_type
    model: PreTrainedModel = AutoModelForCausalLM.from_config(extended)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == extended.rope_parameters
    assert context_length(again.config) == 256 and group_size(again.config) == 64
    far = torch.arange(256)[None]
    for one, two in zip(
        model.model.rotary_emb(torch.zeros(1), far), again.model.rotary_emb(torch.zeros(1), far), strict=True
    ):
        assert torch.equal(one, two)
    unscaled = AutoModelForCausalLM.from_config(base()).model.rotary_emb(torch.zeros(1), far)
    assert not torch.equal(unscaled[0], one)


def test_yarn_llama3_and_longrope_name_the_original_length() -> None:
    for rope_type, given in (("yarn", None), ("llama3", None), ("longrope", LONGROPE)):
        rope = extend_config(base(), 250, rope_type=rope_type, rope_parameters=given).rope_parameters
        assert rope["original_max_position_embeddings"] == 64 and rope["factor"] == 4.0
    assert extend_config(base(), 250, rope_type="llama3").rope_parameters["high_freq_factor"] == 4.0


def test_dynamic_scaling_acts_within_the_new_context() -> None:
    """transformers scales beyond max_position_embeddings only, so that field keeps the old length."""
    extended = extend_config(base(), 256, rope_type="dynamic")
    assert extended.max_position_embeddings == 64 and context_length(extended) == 256
    rotary = AutoModelForCausalLM.from_config(extended).model.rotary_emb
    rotary(torch.zeros(1), torch.arange(256)[None])
    theta = 10000.0 * (4 * 256 / 64 - 3) ** (8 / 6)
    torch.testing.assert_close(rotary.inv_freq, plain_frequencies(theta=theta))
    further = extend_config(extended, 512, rope_type="dynamic")
    assert further.rope_parameters["factor"] == 8.0 and context_length(further) == 512


def test_parameters_given_win() -> None:
    given = {"rope_type": "yarn", "factor": 5.0, "beta_fast": 16, "rope_theta": 20000.0}
    rope = extend_config(base(), 256, rope_type="yarn", rope_parameters=given).rope_parameters
    assert {key: rope[key] for key in given} == given and rope["original_max_position_embeddings"] == 64
    assert given == {"rope_type": "yarn", "factor": 5.0, "beta_fast": 16, "rope_theta": 20000.0}


def test_what_a_model_has_besides_may_be_given() -> None:
    config = base(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "its_own": 1})
    rope = extend_config(config, 256, rope_parameters={"its_own": 2, "type": "linear"}).rope_parameters
    assert (rope["its_own"], rope["factor"]) == (2, 4.0)


def test_linear_factors_multiply() -> None:
    twice = extend_config(extend_config(base(), 256), 700)
    assert twice.rope_parameters["factor"] == 4.0 * math.ceil(700 / 256)
    torch.testing.assert_close(frequencies(twice), plain_frequencies() / 12)
    assert group_size(twice) == 174


@pytest.mark.parametrize(("factor", "context", "further"), [(4.0, 128, 8.0), (4.0, 200, 13.0), (32.0, 128, 64.0)])
def test_llama3_goes_on_from_its_factor(factor: float, context: int, further: float) -> None:
    """Which is no ratio of lengths: Llama 3.2 has 32 for 16 times the context."""
    config = base(rope_parameters={**LLAMA3, "factor": factor})
    extended = extend_config(config, context, rope_type="llama3")
    assert extended.rope_parameters == {**LLAMA3, "factor": further}
    assert bool((frequencies(extended) <= frequencies(config)).all())
    assert frequencies(extended)[-1] < frequencies(config)[-1]


def test_yarn_forgets_an_attention_factor_of_the_old_length() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    config = base(rope_parameters={**yarn, "attention_factor": 1.5, "beta_fast": 16.0})
    rope = extend_config(config, 256, rope_type="yarn").rope_parameters
    assert rope == {**yarn, "factor": 8.0, "beta_fast": 16.0}


def test_sink_and_window_are_fields_of_the_config_where_they_are_asked_for() -> None:
    config = extend_config(base(), 256, sink=True, window=32, group_size=512)
    assert (config.s2attn_sink, config.s2attn_window, config.s2attn_group_size) == (True, 32, 512)
    plain = extend_config(base(), 256)
    assert not hasattr(plain, "s2attn_sink") and not hasattr(plain, "s2attn_window")
    again = extend_config(extend_config(base(), 256, sink=True, window=32, dense_layers=1), 512, window=64)
    assert again.s2attn_window == 64  # what was asked of the first extension and not of the second is gone
    assert not hasattr(again, "s2attn_sink") and not hasattr(again, "s2attn_dense_layers")
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"window must be a positive integer, but it is {wrong}"):
            extend_config(base(), 256, window=wrong)


@pytest.mark.parametrize(
    "options, size",
    [({}, 64), ({"group_ratio": 1 / 3}, 84), ({"group_size": 10}, 10), ({"group_ratio": 1.0}, 256)],
)
def test_group_size(options: dict[str, float], size: int) -> None:
    assert group_size(extend_config(base(), 256, **options)) == size


def test_a_config_for_the_models_own_context_leaves_rope_alone() -> None:
    own = base()
    for context in (None, 64):
        config = config_for(own, context, group_ratio=0.5)
        assert (context_length(config), group_size(config), config.rope_parameters) == (64, 32, own.rope_parameters)
    assert not hasattr(own, "s2attn_context_length") and not hasattr(own, "s2attn_group_size")
    for asked in ({"rope_type": "yarn"}, {"rope_parameters": {"factor": 2.0}}):
        with pytest.raises(ValueError, match="context_length 64 is the model's own: RoPE is not scaled for it"):
            config_for(own, **asked)
    with pytest.raises(ValueError, match="group_size must be an even integer from 2 to twice the context of 64"):
        config_for(own, group_size=130)
    for context in (32, 64.0, True):
        with pytest.raises(ValueError, match=f"at least the model's own 64 tokens, but it is {context}"):
            config_for(own, context)


def test_a_config_for_a_longer_context_is_the_extended_one() -> None:
    assert config_for(base(), 256).to_dict() == extend_config(base(), 256).to_dict()
    scaled = base(rope_parameters=LLAMA3)  # which extend_config has to be told
    assert config_for(scaled, 256).to_dict() == extend_config(scaled, 256, rope_type="llama3").to_dict()
    with pytest.raises(ValueError, match="pass rope_type='llama3'"):
        config_for(scaled, 256, rope_type="linear")
    read = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
    assert context_length(config_for(base(**read), present_context_length=128)) == 128


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "dynamic", "llama3"])
def test_the_same_rope_in_all_layer_types_is_extended(rope_type: str, tmp_path) -> None:
    """Olmo 3 names it for each of them."""
    sizes = {**base().to_dict(), "model_type": "olmo3", "layer_types": ["full_attention"] * 2}
    if "full_attention" not in AutoConfig.for_model(**sizes).rope_parameters:
        pytest.skip("older transformers have one RoPE for all of its layers")
    extended = extend_config(AutoConfig.for_model(**sizes), 256, rope_type=rope_type)
    rope = extend_config(base(), 256, rope_type=rope_type).rope_parameters
    rope["rope_theta"] = extended.rope_parameters["full_attention"]["rope_theta"]
    assert extended.rope_parameters == {"full_attention": rope, "sliding_attention": rope}
    assert rope_type_of(extended) == rope_type
    model = AutoModelForCausalLM.from_config(extended, attn_implementation="s2attn").train()
    assert model(torch.arange(40)[None]).logits.isfinite().all()
    write_record(tmp_path, extended, {}, [])
    config = AutoConfig.for_model(**sizes)
    apply_record(config, read_record(tmp_path))
    assert config.rope_parameters == extended.rope_parameters
    twice = extend_config(extended, 512, rope_type=rope_type).rope_parameters["full_attention"]
    assert (
        twice["factor"]
        == extend_config(extend_config(base(), 256, rope_type=rope_type), 512, rope_type=rope_type).rope_parameters[
            "factor"
        ]
    )


def test_a_config_in_the_old_format_is_read(tmp_path) -> None:
    """Checkpoints of transformers 4 say rope_theta and rope_scaling."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": 4096, "rope_theta": 50000.0,'
        ' "rope_scaling": {"type": "linear", "factor": 2.0}}'
    )
    extended = extend_config(AutoConfig.from_pretrained(tmp_path), 8192, present_context_length=4096)
    assert extended.rope_parameters["factor"] == 4.0
    assert extended.rope_parameters["rope_theta"] == 50000.0
