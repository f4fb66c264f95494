"""The planner where layers differ, and where a token takes a few of many experts: held against formulas by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import plan as command
from app.planning.communication import Sent, sent
from app.planning.dry_run import Counts
from app.planning.planner import Plan, PlannedRun, Way
from longlora_ext._flops import attended_pairs


@torch.library.custom_op("test_plan_layers::product", mutates_args=())
def product(x: torch.Tensor) -> torch.Tensor:
    return x @ x


product.register_fake(torch.empty_like)

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "attention_dropout": 0.0,
}
TOKENS, EXPERTS = 256, 8
#: A forward and backward pass that computes nothing twice.
ONCE = Way(checkpointing=False, tiled_loss=False)

ATTENTION = 2 * 64 * 4 * 16 + 2 * 64 * 2 * 16
DENSE, EXPERT, ROUTER, HEAD = 3 * 64 * 96, 3 * 64 * 40, 64 * EXPERTS, 64 * 2048

#: Of each model: its config, and weights that a token is multiplied by, attention left aside, layer by layer.
MIXTURES: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "mixtral": ("mixtral", {"num_local_experts": EXPERTS}, [ROUTER + 2 * DENSE] * 6),
    "three of its experts": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3}, [ROUTER + 3 * DENSE] * 6),
    "qwen2_moe, a shared expert": (
        "qwen2_moe",
        {"num_experts": EXPERTS, "shared_expert_intermediate_size": 56, "layer_types": ["full_attention"] * 6},
        [ROUTER + 2 * EXPERT + 3 * 64 * 56 + 64] * 6,  # which has a gate of its own
    ),
    "qwen3_moe, some layers without experts": (
        "qwen3_moe",
        {"num_experts": EXPERTS, "mlp_only_layers": [1, 4]},
        [ROUTER + 2 * EXPERT, DENSE, *[ROUTER + 2 * EXPERT] * 2, DENSE, ROUTER + 2 * EXPERT],
    ),
    "qwen3_moe, every third layer with experts": (
        "qwen3_moe",
        {"num_experts": EXPERTS, "decoder_sparse_step": 3},
        [DENSE, DENSE, ROUTER + 2 * EXPERT] * 2,
    ),
    "glm4_moe, the first layers dense": (
        "glm4_moe",
        {"n_routed_experts": EXPERTS, "first_k_dense_replace": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
        [*[DENSE] * 2, *[ROUTER + 3 * EXPERT] * 4],
    ),
    "one layer dense, as in no other": (
        "glm4_moe",
        {"n_routed_experts": EXPERTS, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
        [DENSE, *[ROUTER + 3 * EXPERT] * 5],
    ),
    "olmoe": ("olmoe", {"num_experts": EXPERTS}, [ROUTER + 2 * DENSE] * 6),
}


def mixture(name: str, **changes: Any) -> PreTrainedConfig:
    kind, own, _ = MIXTURES[name]
    config = AutoConfig.for_model(kind, **{**SIZES, **own, **changes})
    return config


def attention_flops(config: PreTrainedConfig, tokens: int) -> int:
    """Two products in the forward pass, five in the backward one."""
    heads = config.num_attention_heads
    return (2 + 5) * 2 * 16 * config.num_hidden_layers * attended_pairs(tokens, tokens // 4, heads, heads // 2)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_token_is_computed_with_the_experts_that_it_takes(name: str) -> None:
    """Of each weight that a token meets: a product forward, two backward, each a multiplication and an addition."""
    config = mixture(name)
    plan = Plan(config, TOKENS, PlannedRun(full_finetune=True))
    active = sum(ATTENTION + weights for weights in MIXTURES[name][2]) + HEAD
    flops = plan.step(ONCE).flops
    assert sum(flops.values()) == 6 * TOKENS * active + attention_flops(config, TOKENS)


@pytest.mark.parametrize("name", MIXTURES)
def test_all_experts_are_in_memory(name: str) -> None:
    config = mixture(name)
    whole = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    plan = Plan(config, TOKENS, PlannedRun(full_finetune=True, zero=0))
    assert plan.parameters["trainable"] == whole
    assert plan.memory(Way())["trained weights"] == 2 * whole


WAYS = [Way(), Way(tiled_loss=False), ONCE, Way(dense=True)]
#: Without experts: what decides over the peak is how wide the layers are, and which come last.
WIDE = {"intermediate_size": 3000, "vocab_size": 64}
ALTERNATING = [name for name in MIXTURES if len(set(MIXTURES[name][2])) > 1]


@pytest.mark.parametrize(
    "name, changes, way",
    [
        *((name, {}, way) for name in ALTERNATING for way in WAYS),
        *((name, WIDE, way) for name in ALTERNATING for way in (Way(), ONCE)),
        ("mixtral", {}, Way()),
        ("olmoe", {}, ONCE),
        ("smollm3", {}, Way()),
    ],
)
def test_kinds_of_layers_add_up_to_the_model(name: str, changes: dict[str, Any], way: Way) -> None:
    """What is found from a few layers of each kind is what the whole model takes, run layer by layer."""
    config = AutoConfig.for_model("smollm3", **SIZES, pad_token_id=0) if name == "smollm3" else mixture(name, **changes)
    plan = Plan(config, TOKENS, PlannedRun())
    assert len(plan.kinds) == (2 if name in (*ALTERNATING, "smollm3") else 1)
    whole, found = plan._run(None, way), plan.step(way)
    assert (found.flops, found.kept, found.peak) == (whole.flops, whole.kept, whole.peak)


OWN_WINDOWS: dict[str, tuple[dict[str, Any], list[int | None]]] = {
    "mistral": ({"sliding_window": 80}, [80] * 6),
    "mistral, of the whole context": ({"sliding_window": TOKENS}, [None] * 6),
    "mistral, longer than the context": ({"sliding_window": 4096}, [None] * 6),
    "mistral, shorter than a group": ({"sliding_window": 24}, [24] * 6),
    "qwen2": ({"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 2}, [None] * 2 + [24] * 4),
    "gemma3_text": (
        {"sliding_window": 24, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
        [24, 24, None] * 2,
    ),
}


@pytest.mark.parametrize("name", OWN_WINDOWS)
@pytest.mark.parametrize("window", [None, 40])
def test_windows_of_the_models_own_are_counted(name: str, window: int | None) -> None:
    """A row sees the smaller of the layer's window and the one asked for; the sink where the layer has no window."""
    changes, own = OWN_WINDOWS[name]
    config = AutoConfig.for_model(name.partition(",")[0], **{**SIZES, "pad_token_id": 0, **changes})
    plan = Plan(config, TOKENS, PlannedRun(sink=True, window=window))
    limits = [min(x for x in (of_layer, window, TOKENS) if x is not None) for of_layer in own]
    pairs = {
        False: [attended_pairs(TOKENS, 64, 4, 2, limit, not layer) for layer, limit in zip(own, limits, strict=True)],
        True: [attended_pairs(TOKENS, TOKENS, 4, 4, layer) for layer in own],
    }
    for dense, of_layers in pairs.items():
        flops = plan.step(Way(checkpointing=False, tiled_loss=False, dense=dense)).flops
        attention = sum(count for op, count in flops.items() if op.startswith("longlora."))
        assert attention == (2 + 5) * 2 * 16 * sum(of_layers)


def test_windows_of_the_models_own_are_sent() -> None:
    """By the halo, as much as the same window that is asked for; layers without one send what their groups need."""

    def halo(kind: str, **fields: Any) -> Sent:
        config = AutoConfig.for_model(kind, **{**SIZES, "pad_token_id": 0, **fields})
        return sent(config, TOKENS, 4, "halo")

    asked, full = (halo("mistral", s2attn_group_size=64, s2attn_window=window) for window in (24, None))
    assert halo("mistral", s2attn_group_size=64, sliding_window=24) == asked
    assert asked.all < full.all
    assert halo("mistral", s2attn_group_size=64, sliding_window=TOKENS) == full
    types = ["sliding_attention", "full_attention", "full_attention"] * 2
    mixed = halo("gemma3_text", s2attn_group_size=64, sliding_window=24, layer_types=types)
    assert mixed.all == (2 * asked.all + 4 * full.all) // 6 and mixed.forward == max(asked.forward, full.forward)


def test_the_command_counts_experts(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Plan, "longest", lambda *_: 0)  # which takes seconds
    mixture("mixtral").save_pretrained(tmp_path)
    command.main(["--model", str(tmp_path), "--context", str(TOKENS), "--full_finetune", "--json"])
    found = json.loads(capsys.readouterr().out)
    active = 6 * (ATTENTION + ROUTER + 2 * DENSE) + HEAD
    flops = found["flops_of_a_sequence"]["s2"]
    # Layers and the loss are computed a second time in the backward pass.
    assert 8 * TOKENS * (active - HEAD) < flops["all"] - flops["attention"] < 8 * TOKENS * active
    assert found["parameters"]["frozen"] == 0


HYBRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_next": (
        {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"] * 3},
        "Qwen3NextGatedDeltaNet, which is no attention",
    ),
    "falcon_h1": ({"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}, "FalconH1Mixer, which is no attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 3}, "Lfm2ShortConv, which is no attention"),
    "gemma4_text": (
        {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 64, "global_head_dim": 32},
        "its config is another one for some layers",
    ),
    "minimax": (
        {"layer_types": ["linear_attention", "full_attention"] * 3},
        "of its 6 layers 3 have another kind of attention",
    ),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_what_cannot_be_counted_is_an_error(family: str, tmp_path: Path, capsys) -> None:
    own, message = HYBRIDS[family]
    AutoConfig.for_model(family, **{**SIZES, **own}).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--model", str(tmp_path), "--context", "512"])
    said = capsys.readouterr().err
    assert said.startswith(f"plan.py: error: --model {tmp_path}: ") and said.count("\n") == 1
    assert message in said and "cannot be planned" in said


def test_an_operation_that_nobody_counts_is_an_error() -> None:
    """One of a library's own, which would count as nothing."""
    unknown = "what the operation test_plan_layers.product computes is not known"
    with pytest.raises(ValueError, match=unknown), Counts(torch.nn.Linear(1, 1), lambda q: 0):
        torch.ops.test_plan_layers.product(torch.empty(2, 2, device="meta"))
