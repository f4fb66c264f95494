"""What is merged, and what comes of full fine-tuning, is read by transformers 4.57 as by the present one."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from longlora_ext.adapter import lora_config, merge, prepare_model, save_adapter
from longlora_ext.adapter._config_file import complete_config
from longlora_ext.config import context_length, extend_config
from merged_models import fp32_base
from tiny_models import CONFIGS, SIZES, tokens

OLDER = "4.57.*"
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
#: RoPE types with what they are given, and the context that a text of 200 tokens is read in.
ROPE: dict[str, dict] = {
    "linear": {},
    "yarn": {"beta_fast": 16.0},
    "dynamic": {},
    "llama3": {},
    "longrope": LONGROPE,
    "default": {"rope_theta": 5e5},
}
FAMILIES = {
    "stablelm": (transformers.StableLmConfig, {"partial_rotary_factor": 0.5}),  # half of a head is rotated
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "head_dim": None, "sliding_window": None}),
}


def made(folder: Path, rope_type: str = "linear", family: str = "llama", how: str = "merged") -> Path:
    """A model folder of weights that are the base model's, in the extended context."""
    base = fp32_base(folder / "base", family)
    config = extend_config(AutoConfig.from_pretrained(base), 256, rope_type=rope_type, rope_parameters=ROPE[rope_type])
    model = AutoModelForCausalLM.from_pretrained(base, config=config, attn_implementation="s2attn")
    full = how == "full fine-tuning"
    model = prepare_model(model, None if full else lora_config(model, use_dora=how == "by PEFT"))
    save_adapter(model, folder / ("made" if full else "adapter"))
    if not full:
        merge(folder / "adapter", folder / "made")
    return folder / "made"


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, family in FAMILIES.items():
        monkeypatch.setitem(CONFIGS, name, family)


@pytest.mark.parametrize("how", ["merged", "by PEFT", "full fine-tuning"])
@pytest.mark.parametrize("rope_type", ROPE)
def test_rope_stands_under_both_names(
    rope_type: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(tmp_path, rope_type, how=how)
    written = json.loads((folder / "config.json").read_text())
    rope = written["rope_parameters"]
    assert written["rope_theta"] == rope["rope_theta"] == (5e5 if rope_type == "default" else 1e4)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert written["rope_scaling"] == (None if rope_type == "default" else scaling)
    caplog.clear()
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        read = AutoConfig.from_pretrained(folder)
        read.save_pretrained(tmp_path / "again")
        again = AutoConfig.from_pretrained(tmp_path / "again")
    transformers.logging.disable_propagation()
    assert not [record.getMessage() for record in caplog.records if "rope" in record.getMessage().lower()]
    assert read.rope_parameters == again.rope_parameters == rope and rope["rope_type"] == rope_type
    assert context_length(read) == context_length(again) == 256


def test_a_part_of_a_head_that_is_rotated_is_said_too(tmp_path: Path) -> None:
    folder = made(tmp_path, "yarn", "stablelm")
    written = json.loads((folder / "config.json").read_text())
    assert written["partial_rotary_factor"] == 0.5 and "partial_rotary_factor" not in written["rope_scaling"]
    assert AutoConfig.from_pretrained(folder).rope_parameters == written["rope_parameters"]


def test_kinds_of_layers_that_are_scaled_alike(tmp_path: Path) -> None:
    """As OLMo 3 has them; where they differ, as in Gemma 3, transformers 4 has a name for the other theta."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    kinds = {"full_attention": rope, "sliding_attention": dict(rope)}
    sizes = {**SIZES, "layer_types": ["full_attention"] * 2, "sliding_window": None, "max_position_embeddings": 256}
    transformers.Olmo3Config(**sizes, rope_parameters=kinds).save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    complete_config(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]["factor"]) == (1e4, 4.0)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters in (before.rope_parameters, rope)  # 5.5 has one for all
    gemma = extend_config(transformers.Gemma3TextConfig(max_position_embeddings=4096, sliding_window=512), 16384)
    gemma.save_pretrained(tmp_path)
    complete_config(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 1e4)
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == gemma.rope_parameters
    transformers.MellumConfig().save_pretrained(tmp_path)  # which transformers 4 does not have
    complete_config(tmp_path)
    assert "rope_scaling" not in json.loads((tmp_path / "config.json").read_text())


def test_head_dim_is_filled_in(tmp_path: Path) -> None:
    """Without it no transformers can load a scaled Mixtral."""
    folder = made(tmp_path, "yarn", "mixtral")
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 8
    AutoModelForCausalLM.from_pretrained(folder)


LOGITS = """
import sys, torch, transformers
assert transformers.__version__.startswith(sys.argv[1]), transformers.__version__
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        torch.save(model(torch.load(folder + "/ids.pt")).logits, folder + "/logits.pt")
"""


@pytest.mark.full
def test_transformers_4_reads_the_same(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", packages]
    subprocess.run([*pip, f"transformers=={OLDER}"], check=True)
    cases = [(rope_type, "llama", "merged") for rope_type in ROPE]
    cases += [("linear", "stablelm", "merged"), ("yarn", "mixtral", "merged"), ("linear", "qwen3", "merged")]
    cases += [("linear", "llama", "by PEFT"), ("llama3", "llama", "full fine-tuning")]
    folders = []
    for number, case in enumerate(cases):
        folders.append(made(tmp_path / str(number), *case))
        torch.save(tokens(2, 200), folders[-1] / "ids.pt")
    environment = os.environ | {"PYTHONPATH": str(packages)}
    command = [sys.executable, "-c", LOGITS, OLDER.removesuffix("*"), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, folder in zip(cases, folders, strict=True):
        with torch.no_grad():
            want = AutoModelForCausalLM.from_pretrained(folder)(tokens(2, 200)).logits
        torch.testing.assert_close(
            torch.load(folder / "logits.pt"),
            want,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda found, case=case: f"{case}: {found}",
        )
