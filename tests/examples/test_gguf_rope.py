"""RoPE that a GGUF file scales, which transformers does not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tiny_gguf
from app.models.convert_gguf import convert_gguf
from app.models.gguf_rope import LLAMA3, read_model_config
from app.planning.presets import read_config
from tiny_gguf import logits, open_for_evaluation, save_gguf, save_small


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("tiny"))


ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "llama3": {"factor": 8.0, **LLAMA3},
}


def scaled_model(tiny: Path, folder: Path, rope: dict[str, Any], name: str = "folder") -> Path:
    """The tiny Llama with another RoPE."""
    config = AutoConfig.from_pretrained(tiny)
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    config.max_position_embeddings = 131072 if rope["rope_type"] == "llama3" else 1024
    AutoModelForCausalLM.from_pretrained(tiny, config=config).save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize("rope_type", ROPE)
def test_rope_is_scaled_as_the_file_says(tiny: Path, rope_type: str, tmp_path: Path) -> None:
    """Which transformers does not read: RoPE would be unscaled, without a word."""
    rope = {"rope_type": rope_type, **ROPE[rope_type]}
    folder = scaled_model(tiny, tmp_path, rope)
    save_gguf(folder, tmp_path / "model.gguf")
    expected = AutoModelForCausalLM.from_pretrained(folder)
    # What a factor multiplies is not said of linear scaling, neither by a file nor by a folder.
    settled = ["--present_context_length", 1024] if rope_type == "linear" else []
    found = open_for_evaluation("--model", tmp_path / "model.gguf", "--dtype", "float32", *settled)
    assert found.model.config.rope_parameters == {"rope_theta": 10000.0, **rope}
    assert torch.equal(logits(found.model), logits(expected))
    assert found.trained_length == expected.config.max_position_embeddings
    converted = convert_gguf(str(tmp_path), "model.gguf", tmp_path / "converted", torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(converted)), logits(expected))
    assert read_config(str(tmp_path), "model.gguf").rope_parameters == found.model.config.rope_parameters


def test_rope_that_is_scaled_in_an_unknown_way_is_an_error(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By other factors than Llama 3's, by longrope, or by yarn with a number that is not known."""
    rope = {"rope_type": "llama3", **ROPE["llama3"], "original_max_position_embeddings": 256}
    save_gguf(scaled_model(tiny, tmp_path, rope), tmp_path / "llama3.gguf")
    yarn = scaled_model(tiny, tmp_path, {"rope_type": "yarn", **ROPE["yarn"]}, "yarn")
    said = {
        "longrope": lambda writer, config: writer.add_tensor("rope_factors_long.weight", np.ones(16, np.float32)),
        "yarn": lambda writer, config: (
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            writer.add_rope_scaling_factor(4.0),
            writer.add_rope_scaling_yarn_log_mul(0.1),
        ),
    }
    for name, write in said.items():
        monkeypatch.setattr(tiny_gguf, "_write_scaling", write)
        save_gguf(yarn, tmp_path / f"{name}.gguf")
    messages = {"llama3": "not Llama 3's", "longrope": "by longrope", "yarn": r"\(type yarn, yarn_log_multiplier\)"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=f"{name}.gguf scales RoPE .*{message}.*: use the model's own folder"):
            read_model_config(str(tmp_path), f"{name}.gguf")
