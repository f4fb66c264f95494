"""Merging a mixture of experts: its files hold a tensor for each expert, of which transformers 5 makes one weight."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from longlora_ext.adapter import load, merge
from test_merge import fp32_base, peak_while, save_random_adapter
from tiny_models import CONFIGS, tokens
from tiny_training import save_base

FEW = {"num_experts_per_tok": 2}
QWEN = {"num_experts": 4, "moe_intermediate_size": 16, "sliding_window": None, **FEW}
EXPERTS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "head_dim": None, "sliding_window": None, **FEW}),
    "qwen2_moe": (Qwen2MoeConfig, {"shared_expert_intermediate_size": 16, **QWEN}),
    "qwen3_moe": (Qwen3MoeConfig, QWEN),
    "olmoe": (OlmoeConfig, {"num_experts": 4, **FEW}),
    "granitemoe": (GraniteMoeConfig, {"num_local_experts": 4, **FEW}),
}


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, family in EXPERTS.items():
        monkeypatch.setitem(CONFIGS, name, family)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens(2, 150)).logits


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("longlora_ext")]


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_merged_by_shards_as_peft_merges_them(family: str, tmp_path: Path, caplog) -> None:
    base = fp32_base(tmp_path / "base", family)
    adapter = save_random_adapter(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", max_shard_size="10KB")
    assert reasons(caplog) == []
    merged, before = weights_of(tmp_path / "merged"), weights_of(base)
    assert merged.keys() == before.keys() and len(list((tmp_path / "merged").glob("*.safetensors"))) > 3
    changed = {name for name, weight in merged.items() if not weight.equal(before[name])}
    trained = ("_proj.weight", "norm.weight", "embed_tokens.weight")
    assert changed == {
        name for name in merged if name.endswith(trained) and ".mlp." not in name and ".shared" not in name
    }
    by_peft = load(adapter, attn_implementation="sdpa").merge_and_unload()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, weight in by_peft.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits_of(again), logits_of(by_peft), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_one_shard_of_experts_is_in_memory_at_a_time(family: str, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 512, "moe_intermediate_size": 512, "num_local_experts": 8, "num_experts": 8}
    base = save_base(tmp_path / "base", family, hidden_size=256, num_hidden_layers=8, **sizes)
    adapter = save_random_adapter(base, tmp_path / "adapter")
    size = (base / "model.safetensors").stat().st_size
    merge(adapter, tmp_path / "warm-up", max_shard_size="4MB")  # what is loaded once
    peaks = {shard: peak_while(lambda shard=shard: merge(adapter, tmp_path / shard, max_shard_size=shard))
             for shard in ("4MB", "1GB")}  # fmt: skip
    assert peaks["4MB"] < size / 2 < size < peaks["1GB"], (peaks, size)


def test_a_router_that_was_trained_is_merged_by_shards(tmp_path: Path, caplog) -> None:
    """Mixtral's files call it by another name than the model."""
    base = fp32_base(tmp_path / "base", "mixtral")
    adapter = save_random_adapter(base, tmp_path / "adapter", modules_to_save=["gate", "norm"])
    merge(adapter, tmp_path / "merged")
    assert reasons(caplog) == []
    want = logits_of(load(adapter, attn_implementation="sdpa"))
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    assert not weights_of(tmp_path / "merged")[name].equal(weights_of(base)[name])


def test_experts_that_were_trained_are_merged_by_peft(tmp_path: Path, caplog) -> None:
    base = fp32_base(tmp_path / "base", "qwen3_moe")
    adapter = save_random_adapter(base, tmp_path / "adapter", modules_to_save=["experts"])
    merge(adapter, tmp_path / "merged")
    (reason,) = reasons(caplog)
    assert reason.startswith("the adapter changes model.layers.0.mlp.experts.down_proj, which no tensor of the base")
    want = logits_of(load(adapter, attn_implementation="sdpa"))
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want)


def test_an_expert_that_is_missing_is_found_out(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3_moe")
    adapter = save_random_adapter(base, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.experts.2.down_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"(cannot load )?the base model .*base( is incomplete|: )"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_a_model_has_no_place_for_is_left_out(tmp_path: Path, caplog) -> None:
    """As transformers does when it loads it, such as layers that predict further tokens."""
    caplog.set_level(logging.WARNING)
    base = save_base(tmp_path / "base", "qwen3_moe")
    adapter = save_random_adapter(base, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"mtp.layers.0.weight": torch.ones(3)}, base / "model.safetensors", metadata={"format": "pt"})
    merge(adapter, tmp_path / "merged")
    assert weights_of(tmp_path / "merged").keys() == weights.keys() and reasons(caplog) == []
