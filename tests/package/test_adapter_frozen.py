"""Adapters of which a part is frozen, at the start, later, or when it is saved: all of it is saved. And what trains
beside an adapter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from longlora_ext.adapter import load, lora_config, merge, prepare_model, save_adapter
from merged_models import assert_same_logits, fp32_base, save_random_adapter
from tiny_models import tokens
from tiny_training import extended_model, train

WEIGHTS = "adapter_model.safetensors"


def first_lora(name: str) -> bool:
    return "layers.0" in name and "lora_" in name


def embedding(name: str) -> bool:
    return "embed_tokens" in name


def prepared(base: Path, **overrides: object) -> PeftModel:
    model = extended_model(base, torch.float32)
    return prepare_model(model, lora_config(model, **overrides))


def freeze(model: PeftModel, which: Callable[[str], bool]) -> None:
    for name, weight in model.named_parameters():
        if which(name):
            weight.requires_grad_(False)


def assert_saved(model: PeftModel, base: Path, folder: Path) -> None:
    """What is loaded is the model, and so is what is merged."""
    save_adapter(model, folder / "adapter")
    ids = tokens(1, 150)
    again = load(folder / "adapter", dtype=torch.float32)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    merge(folder / "adapter", folder / "merged")
    assert_same_logits(folder / "adapter", folder / "merged", base)


@pytest.mark.parametrize("overrides", [{}, {"modules_to_save": None}], ids=["all", "lora alone"])
def test_a_loaded_adapter_is_saved_whole(overrides: dict, tmp_path: Path) -> None:
    base = fp32_base(tmp_path / "base")
    first = save_random_adapter(base, tmp_path / "first", **overrides)
    assert_saved(load(first, dtype=torch.float32), base, tmp_path)
    before, after = load_file(first / WEIGHTS), load_file(tmp_path / "adapter" / WEIGHTS)
    assert before and before.keys() == after.keys()
    assert all(weight.equal(before[name]) for name, weight in after.items())


@pytest.mark.parametrize("which", [first_lora, embedding])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_is_frozen_later_keeps_what_it_has_learned(which, tied: bool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base = fp32_base(tmp_path / "base", tie_word_embeddings=tied)
    model = prepared(base)
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
    freeze(model, which)
    train(model)
    assert_saved(model, base, tmp_path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_single_tokens_may_be_trained(tied: bool, tmp_path: Path) -> None:
    """PEFT wraps the embedding, which is frozen."""
    base = fp32_base(tmp_path / "base", tie_word_embeddings=tied)
    save_random_adapter(base, tmp_path / "adapter", trainable_token_indices=[3, 4], modules_to_save=None)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert_same_logits(tmp_path / "adapter", tmp_path / "merged", base)
    assert "model.embed_tokens.weight" in json.loads((tmp_path / "adapter/longlora.json").read_text())["base_weights"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_trains_beside_the_adapter_is_not_lost_without_a_word(tied: bool, tmp_path: Path) -> None:
    base = fp32_base(tmp_path / "base", tie_word_embeddings=tied)
    for overrides in ({}, {"modules_to_save": None}):
        model = prepared(base, **overrides)
        model.get_output_embeddings().weight.requires_grad_(True)
        if tied and not overrides:  # it is the embedding, which the adapter has
            assert_saved(model, base, tmp_path)
            continue
        with pytest.raises(
            ValueError, match=r"would not be saved: lm_head.weight\. Name their modules in modules_to_sav"
        ):
            save_adapter(model, tmp_path / "lost")
        assert not (tmp_path / "lost").exists()
    with model.disable_adapter():
        model.get_output_embeddings().weight.requires_grad_(False)
        save_adapter(model, tmp_path / "disabled")
