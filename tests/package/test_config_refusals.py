"""What `extend_config` refuses: arguments that cannot be meant, and models that cannot be extended."""

import inspect
import math
import re

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longlora_ext._rope_parameters import PARAMETERS
from longlora_ext.config import extend_config


def base() -> LlamaConfig:
    return LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=64)


def test_the_parameters_of_each_type_are_those_that_transformers_looks_at() -> None:
    assert PARAMETERS.keys() >= {"default", *ROPE_INIT_FUNCTIONS}
    for rope_type, computed in ROPE_INIT_FUNCTIONS.items():
        looked_at = set(re.findall(r"""rope_parameters\w*(?:\.get\(|\[)["'](\w+)["']""", inspect.getsource(computed)))
        assert {"rope_theta"} < looked_at <= {"rope_theta", "partial_rotary_factor", *PARAMETERS[rope_type]}, rope_type


@pytest.mark.parametrize(
    "context, options, message",
    [
        (64, {}, "above the model's present context of 64 tokens, but it is 64"),
        (32, {}, "above the model's present context"),
        (128.0, {}, "must be an integer .* but it is 128.0"),
        (True, {}, "must be an integer"),
        (256, {"group_size": 7}, "group_size must be an even integer from 2 to twice .* 256, but it is 7"),
        (256, {"group_size": 514}, "but it is 514"),
        (256, {"group_size": 0}, "but it is 0"),
        (256, {"group_ratio": 0}, "group_ratio must be a number above 0 and at most 1, but it is 0"),
        (256, {"group_ratio": 1.5}, "but it is 1.5"),
        (256, {"group_ratio": math.nan}, "but it is nan"),
        (256, {"group_ratio": "0.25"}, "group_ratio must be a number .* but it is '0.25'"),
        (256, {"group_ratio": True}, "group_ratio must be a number .* but it is True"),
        (256, {"sink": "false"}, "sink must be true or false, but it is 'false'"),
        (256, {"sink": None}, "sink must be true or false, but it is None"),
        (256, {"rope_type": "cubic"}, "rope_type must be one of default, linear, .* but it is 'cubic'"),
        (256, {"rope_type": "longrope"}, "needs rope_parameters with short_factor and long_factor"),
        (256, {"rope_parameters": {"rope_type": "yarn"}}, "say rope_type 'yarn', but rope_type is 'linear'"),
        (256, {"rope_parameters": {"type": "yarn"}}, "say rope_type 'yarn', but rope_type is 'linear'"),
        (256, {"rope_parameters": {"factor": "x"}}, "factor must be a finite number of at least 1, but it is 'x'"),
        (256, {"rope_parameters": {"factor": 0.25}}, "factor must be a finite number of at least 1, but it is 0.25"),
        (256, {"rope_parameters": {"factor": True}}, "factor must be .* but it is True"),
        (256, {"rope_type": "yarn", "rope_parameters": {"factor": math.inf}}, "factor must be .* but it is inf"),
        (
            256,
            {"rope_type": "default", "rope_parameters": {"factor": 8}},
            "'default' has no parameter factor: only rope_t",
        ),
        (256, {"rope_type": "yarn", "rope_parameters": {"beta_fst": 16}}, "'yarn' has no parameter beta_fst: only fac"),
        (
            256,
            {"rope_parameters": {"full_attention": {"factor": 8}}},
            "must be one set, .* have one for full_attention",
        ),
        (256, {"rope_parameters": [1]}, r"rope_parameters must be a dict, but they are \[1\]"),
        (256, {"rope_type": "default", "rope_parameters": {"rope_theta": 0}}, "rope_theta must be .* but it is 0"),
        (256, {"rope_type": "default", "rope_parameters": {"rope_theta": math.nan}}, "rope_theta .* but it is nan"),
        (256, {"rope_type": "yarn", "rope_parameters": {"rope_theta": "x"}}, "rope_theta .* but it is 'x'"),
    ],
)
def test_bad_arguments_are_refused(context: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extend_config(base(), context, **options)


def test_other_scaling_is_not_replaced() -> None:
    with pytest.raises(ValueError, match=r"scaled with rope_type 'llama3' already .* pass rope_type='llama3'"):
        extend_config(extend_config(base(), 128, rope_type="llama3"), 256)
    with pytest.raises(ValueError, match="scaled with rope_type 'linear' already"):
        extend_config(extend_config(base(), 128), 256, rope_type="yarn")


def test_models_without_one_rotary_embedding_are_refused() -> None:
    with pytest.raises(ValueError, match="GPT2Config has no rope_parameters: only decoders with rotary"):
        extend_config(GPT2Config(), 4096)
    with pytest.raises(ValueError, match="different RoPE parameters for different layers"):
        extend_config(Gemma3TextConfig(sliding_window=10**6), 10**6)  # which holds all tokens
