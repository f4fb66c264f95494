"""`rope_type="ntk"`: a larger `rope_theta`, saved as a plain one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import evaluate
from finetune_runs import make_model
from longlora_ext.config import config_for, context_length, extend_config, rope_type_of
from tiny_models import tiny_config

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def test_theta_is_computed_and_saved_plain() -> None:
    """By hand, for SmolLM2-135M: heads of 64, theta 100,000, twice the context."""
    base = AutoConfig.for_model(
        "llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rope_theta=100000.0, num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    config = extend_config(base, 16384, rope_type="ntk")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": pytest.approx(204522.287, abs=1e-3)}
    assert (config.max_position_embeddings, context_length(config), rope_type_of(config)) == (16384, 16384, "default")
    assert base.rope_parameters["rope_theta"] == 100000.0
    short, long = (AutoModelForCausalLM.from_config(c).model.rotary_emb.inv_freq for c in (base, config))
    assert long[0] == short[0] == 1 and long[-1] == pytest.approx(short[-1] / 2)  # the slowest as by linear scaling


def test_steps_come_to_the_same_as_one_step() -> None:
    base = tiny_config()
    once = extend_config(base, 512, rope_type="ntk").rope_parameters["rope_theta"]
    for lengths in ([128, 512], [96, 512], [128, 256, 512]):
        config = base
        for length in lengths:
            config = config_for(config, length, rope_type="ntk")
        assert config.rope_parameters["rope_theta"] == pytest.approx(once)
    assert extend_config(base, 96, rope_type="ntk").rope_parameters["rope_theta"] == pytest.approx(1e4 * 1.5 ** (8 / 6))


@pytest.mark.parametrize("present", SCALED)
def test_a_scaled_model_is_an_error(present: str) -> None:
    rope = {"rope_type": present, "rope_theta": 10000.0, **SCALED[present]}
    length = 64 if present == "dynamic" else 256
    config = tiny_config(rope_parameters=rope, max_position_embeddings=length, s2attn_context_length=256)
    message = f"scaled with rope_type '{present}' already and cannot be extended with 'ntk'.*rope_type='{present}'"
    with pytest.raises(ValueError, match=message):
        extend_config(config, 1024, rope_type="ntk")


def test_thetas_of_the_layers_are_an_error() -> None:
    """The model would not look at the one that is changed."""
    config = tiny_config(layer_rope_theta=[1e4, 1e6])
    with pytest.raises(ValueError, match="layers of this model have thetas of their own"):
        extend_config(config, 1024, rope_type="ntk")


def test_another_type_goes_on_from_there() -> None:
    """It is a model with another theta, to every type."""
    config = extend_config(extend_config(tiny_config(), 128, rope_type="ntk"), 256)
    assert config.rope_parameters == {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": pytest.approx(1e4 * 2 ** (8 / 6)),
    }


@pytest.mark.parametrize(
    "kind, fields, rotated",
    [
        ("gpt_neox", {"rotary_pct": 0.5}, 4),
        ("phi", {"partial_rotary_factor": 0.5}, 4),
        ("stablelm", {"partial_rotary_factor": 0.5}, 4),
        ("qwen3", {"head_dim": 16}, 16),
        ("mistral", {"head_dim": None}, 8),
        ("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}, 8),
        ("qwen2", {}, 8),
    ],
)
def test_the_dimensions_are_those_that_are_rotated(kind: str, fields: dict[str, Any], rotated: int) -> None:
    base = AutoConfig.for_model(
        kind, vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, **fields,
    )  # fmt: skip
    config = extend_config(base, 256, rope_type="ntk")
    theta = base.rope_parameters["rope_theta"]
    assert config.rope_parameters["rope_theta"] == pytest.approx(theta * 4 ** (rotated / (rotated - 2)))
    assert set(config.rope_parameters) == set(base.rope_parameters)
    models = [AutoModelForCausalLM.from_config(c) for c in (base, config)]
    short, long = (next(b for name, b in m.named_buffers() if name.endswith("inv_freq")) for m in models)
    assert len(short) == rotated // 2
    torch.testing.assert_close(long[-1], short[-1] / 4)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rope_theta": 1e6}, "rope_type 'ntk' has no parameter rope_theta: only factor"),
        ({"factor": 0.5}, "factor must be a finite number of at least 1, but it is 0.5"),
        ({"factor": math.inf}, "factor must be a finite number of at least 1"),
        ({"factor": "8"}, "factor must be a finite number of at least 1, but it is '8'"),
        ({"rope_type": "yarn"}, "rope_parameters say rope_type 'yarn', but rope_type is 'ntk'"),
    ],
)
def test_wrong_parameters_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extend_config(tiny_config(), 256, rope_type="ntk", rope_parameters=given)


def test_a_factor_of_ones_own() -> None:
    config = extend_config(tiny_config(), 256, rope_type="ntk", rope_parameters={"factor": 8})
    assert config.rope_parameters["rope_theta"] == pytest.approx(1e4 * 8 ** (8 / 6))


def test_layer_types_that_share_their_rope_keep_it_apart() -> None:
    """Those whose sliding window stays what it was keep their RoPE, too."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    types = ["sliding_attention", "full_attention"]
    base = tiny_config(rope_parameters={name: dict(rope) for name in types}, layer_types=types)
    found = extend_config(base, 256, rope_type="ntk").rope_parameters
    assert found == {
        "sliding_attention": rope,
        "full_attention": {"rope_type": "default", "rope_theta": pytest.approx(1e4 * 4 ** (8 / 6))},
    }


def test_the_evaluation_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "base")
    (tmp_path / "text.txt").write_text("abc " * 100)
    evaluate.main(
        ["perplexity", "--model", str(tmp_path / "base"), "--text", str(tmp_path / "text.txt"), "--max_tokens", "128",
         "--context_length", "128", "--rope_type", "ntk", "--output", str(tmp_path / "out")]
    )  # fmt: skip
    assert "rope_theta=63496" in capsys.readouterr().out
