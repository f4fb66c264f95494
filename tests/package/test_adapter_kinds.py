"""Adapters that are not plain LoRA: what is trained is saved, and read again as it was, or refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from longlora_ext import extend_config, load, lora_config, prepare_model, save_adapter
from tiny_models import VOCABULARY, tiny_config

ON = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS: dict[str, Any] = {
    "LoHa": lambda model: peft.LoHaConfig(r=2, **ON),
    "LoKr": lambda model: peft.LoKrConfig(r=2, **ON),
    "VeRA": lambda model: peft.VeraConfig(r=4, **ON),
    "VeRA, its projections made anew": lambda model: peft.VeraConfig(r=4, save_projection=False, **ON),
    "IA3": lambda model: peft.IA3Config(feedforward_modules=[], **ON),
    "LoRA of a tied embedding": lambda model: lora_config(
        model, target_modules=["q_proj", "embed_tokens"], modules_to_save=None, ensure_weight_tying=True
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def extended(base: Path) -> Any:
    config = extend_config(tiny_config(tie_word_embeddings=True), 128)
    return AutoModelForCausalLM.from_pretrained(base, config=config, attn_implementation="s2attn", dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_saved_and_read(kind: str, base: Path, tmp_path: Path) -> None:
    model = extended(base)
    model = prepare_model(model, KINDS[kind](model))
    ids = torch.arange(3, 3 + 40)[None] % VOCABULARY
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    before = model.eval()(ids).logits.detach()
    for _ in range(2):
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
    after = model.eval()(ids).logits.detach()
    assert (after - before).abs().max() > 1e-3
    save_adapter(model, tmp_path / "adapter")
    read = load(tmp_path / "adapter", dtype=torch.float32).eval()
    torch.testing.assert_close(read(ids).logits, after, atol=1e-5, rtol=1e-5)


def test_prompts_are_no_adapter_of_weights(base: Path) -> None:
    with pytest.raises(ValueError, match="PromptTuningConfig learns a prompt and changes no layer"):
        prepare_model(extended(base), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
