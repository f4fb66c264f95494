"""Models are asked, before they are trained, whether documents, rows and the future are apart (independence.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import finetune_llama
from finetune_runs import CONTEXT, losses, make_model, make_text, small_run
from longlora_ext.adapter import lora_config, prepare_model
from longlora_ext.independence import check_documents_apart
from longlora_ext.loss import tile_loss
from tiny_models import CONFIGS, SIZES, tiny_model, tokens

LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
#: Models with layers that do not heed position_ids, and where it begins in each.
HYBRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_next": (LINEAR | MOE | {"layer_types": ["linear_attention", "full_attention"]}, "layers.0.linear_attn"),
    "qwen3_5_text": (LINEAR | {"layer_types": ["full_attention", "linear_attention"]}, "layers.1.linear_attn"),
    "falcon_h1": ({**MAMBA, "mamba_d_ssm": 64, "mamba_chunk_size": 16}, "layers.0.mamba"),
    "bamba": ({**MAMBA, "attn_layer_indices": [1], "mamba_chunk_size": 16}, "layers.0.mamba"),
    "jamba": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
        "layers.0.mamba",
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers.0.conv"),
    "minimax": ({"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2}, "layers.0.self_attn"),
}


def model_of(kind: str, attention: str = "s2attn", **changes: Any) -> PreTrainedModel:
    """With the library's own initialisation, which leaves attention nearly uniform and leaks small."""
    sizes = {name: value for name, value in SIZES.items() if name != "initializer_range"}
    config = AutoConfig.for_model(kind, **{**sizes, "max_position_embeddings": 128, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_hybrid_needs_rows_of_its_documents_own(kind: str) -> None:
    fields, where = HYBRIDS[kind]
    model = model_of(kind, **fields)
    with pytest.raises(ValueError, match=rf"see each other, beginning in model.{where} .* .rows padded, packed=False"):
        check_documents_apart(model)
    check_documents_apart(model, packed=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_attention_keeps_documents_apart(family: str, dtype: torch.dtype) -> None:
    check_documents_apart(tiny_model(family, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.1, "sliding_window": None}),
        ("qwen2_moe", MOE),
        ("qwen3_moe", MOE),
        ("olmoe", MOE),
    ],
)
def test_experts_that_round_by_what_else_they_compute_are_no_leak(kind: str, fields: dict, dtype: torch.dtype) -> None:
    check_documents_apart(model_of(kind, **fields).to(dtype))


def test_a_model_that_is_prepared_for_training() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    prepared = tile_loss(prepare_model(model, lora_config(model, lora_dropout=0.5)))
    check_documents_apart(prepared)
    check_documents_apart(torch.compile(prepared, backend="eager"))
    assert model.model.gradient_checkpointing
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_documents_apart(prepare_model(tiny_model(dtype=torch.float32), None))


class Shift(nn.Module):
    """Adds a share of each token's neighbour to it."""

    def __init__(self, share: float, by: int = 1) -> None:
        super().__init__()
        self.share, self.by = share, by

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.share * shifted(hidden, self.by)


def shifted(hidden: Tensor, by: int = 1) -> Tensor:
    return nn.functional.pad(hidden, (0, 0, by, -by))


def with_layer(mixer: nn.Module, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A Llama in whose last layer a module comes before the MLP."""
    model = tiny_model(dtype=dtype, **changes)
    layer = model.model.layers[-1]
    layer.mlp = nn.Sequential(mixer, layer.mlp)
    return model


@pytest.mark.parametrize("initializer_range", [0.2, 0.002])
@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)], ids=str
)
def test_a_weak_leak_is_found(dtype: torch.dtype, share: float, initializer_range: float) -> None:
    model = with_layer(Shift(share), dtype, initializer_range=initializer_range)
    with pytest.raises(ValueError, match="documents packed into one row see each other"):
        check_documents_apart(model)


def test_the_module_is_named_through_an_adapter() -> None:
    model = with_layer(Shift(0.1))
    with pytest.raises(ValueError, match=r"beginning in model.layers.1.mlp.0 \(Shift\)"):
        check_documents_apart(prepare_model(model, lora_config(model)))


class BatchStatistics(nn.Module):
    """Tells of all tokens of a batch, and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, hidden: Tensor) -> Tensor:
        self.mean.lerp_(hidden.detach().mean(dim=(0, 1)), 0.1)
        return hidden - self.mean


class Capacity(nn.Module):
    """Lets each of four experts take so many tokens of a batch, first come, first served. That has no gradient."""

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = nn.functional.one_hot(hidden[..., :4].argmax(dim=-1).flatten(), 4)
        places = (chosen.cumsum(dim=0) * chosen).sum(dim=1)
        return hidden * (places <= len(chosen) * 1.25 / 4).view(*hidden.shape[:2], 1)


class Gate(nn.Module):
    """Adds a constant where the token before has some property. That has no gradient."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + (shifted(hidden)[..., :1] > 0)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (Shift(0.01, by=-1), "tokens see those after them"),
        (BatchStatistics(), "rows of a batch see each other"),
        (Capacity(), "see each other"),
        (Gate(), "documents packed into one row see each other"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_leaks(mixer: nn.Module, message: str) -> None:
    model = with_layer(mixer)
    with pytest.raises(ValueError, match=message):
        check_documents_apart(model)
    if not isinstance(mixer, Gate):
        with pytest.raises(ValueError, match=r"rows of a batch|tokens see those after"):
            check_documents_apart(model, packed=False)


def test_the_dense_attention_of_the_last_steps_is_tried_too() -> None:
    model = tiny_model(dtype=torch.float32)

    def leak_if_dense(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> Any:
        dense = module.config.s2attn_mode == "dense"
        return (output[0] + shifted(output[0]), output[1]) if dense else output

    model.config.s2attn_mode = "auto"
    model.model.layers[0].self_attn.register_forward_hook(leak_if_dense)
    with pytest.raises(ValueError, match="packed into one row"):
        check_documents_apart(model)
    assert model.config.s2attn_mode == "auto"


@pytest.mark.parametrize("leaks", [False, True])
def test_nothing_changes(leaks: bool) -> None:
    """Not even if it ends with an error."""
    model = with_layer(BatchStatistics() if leaks else nn.Dropout(0.5)).eval()
    model.model.layers[0].train()
    weight = model.model.norm.weight
    weight.grad = torch.ones_like(weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, config, random = [m.training for m in model.modules()], model.config.to_dict(), torch.get_rng_state()
    try:
        check_documents_apart(model)
    except ValueError:
        assert leaks
    assert [m.training for m in model.modules()] == modes and model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(weight.grad, torch.ones_like(weight)) and model.lm_head.weight.grad is None
    assert not model.get_input_embeddings()._forward_hooks
    model(tokens(1, 5), labels=tokens(1, 5)).loss.backward()


def test_what_a_model_remembers_is_taken_back_if_it_fails() -> None:
    """Behind the layer that remembers, there is one that fails: out of memory, say."""
    model = with_layer(BatchStatistics())
    model.model.norm.register_forward_hook(lambda *_: torch.zeros(1 << 62))
    with pytest.raises(RuntimeError):
        check_documents_apart(model)
    assert not model.model.layers[-1].mlp[0].mean.any()


def test_a_model_that_takes_no_position_ids() -> None:
    model = model_of("mamba", "eager", state_size=8)
    with pytest.raises(ValueError, match=r"MambaForCausalLM takes no position_ids, .* .rows padded, packed=False"):
        check_documents_apart(model)
    check_documents_apart(model, packed=False)


def test_a_model_whose_attention_is_not_transformers_own() -> None:
    """Bloom computes attention itself, with no mask where S2-Attn hands none over: nothing is causal.

    It is refused as it is built for S2-Attn. The probe finds what is told later, past that check.
    """
    with pytest.raises(ValueError, match="does not reach the attention of BloomModel"):
        model_of("bloom", n_head=4, n_layer=2)
    model = model_of("bloom", "eager", n_head=4, n_layer=2)
    model.config._attn_implementation = "s2attn"
    with pytest.raises(ValueError, match=r"tokens see those after them, .*BloomAttention"):
        check_documents_apart(model, packed=False)


def test_a_model_whose_layers_learn_of_documents_by_the_mask_alone() -> None:
    """transformers looks for packed documents where there is no KV cache."""
    model = model_of("persimmon")
    with pytest.raises(ValueError, match=r"PersimmonAttention.* Train it without a KV cache: config.use_cache=False"):
        check_documents_apart(model)
    model.config.use_cache = False
    check_documents_apart(model)


def test_numbers_that_are_not_finite() -> None:
    """Weights that are not make a loss that tells; a NaN that comes from another document is a leak."""
    model = tiny_model(dtype=torch.float32)
    model.model.norm.weight.data[3] = torch.nan
    check_documents_apart(model)
    model = with_layer(Gate())
    gate = model.model.layers[-1].mlp[0]
    gate.register_forward_hook(lambda module, args, output: output.where(output == args[0], torch.nan))
    with pytest.raises(ValueError, match="documents packed into one row see each other"):
        check_documents_apart(model)


def test_other_attention_is_tried_as_it_is() -> None:
    check_documents_apart(tiny_model(attn_implementation="sdpa", dtype=torch.float32, use_cache=False))


# --- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a hybrid with the tokenizer of the tiny model, and a text."""
    folder = tmp_path_factory.mktemp("hybrid")
    make_model(folder / "model")
    fields = HYBRIDS["qwen3_next"][0]
    model_of("qwen3_next", **fields, vocab_size=257, max_position_embeddings=CONTEXT).save_pretrained(folder / "model")
    return folder / "model", make_text(folder / "text.jsonl")


def answers(path: Path) -> Path:
    rows = [{"instruction": f"say {n}", "output": f"{n} " * (n % 7 + 1)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("task", ["text", "sft"])
def test_a_run_gives_documents_of_a_hybrid_rows_of_their_own(
    hybrid: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    text = hybrid[1] if task == "text" else answers(tmp_path / "answers.jsonl")
    command = [*small_run(hybrid[0], text, tmp_path / "out", steps=2), "--eval_tokens", "0", "--task", task]
    with pytest.raises(SystemExit, match="2"):
        finetune_llama.main(command)
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1 and "documents packed into one row see each other" in said[0]
    assert "beginning in model.layers.0.linear_attn (Qwen3NextGatedDeltaNet)" in said[0]
    assert f"{hybrid[0]}: --rows packed: in Qwen3Next" in said[0] and "(rows padded, packed=False)" in said[0]
    assert not (tmp_path / "out" / "adapter").exists()
    finetune_llama.main([*command, "--rows", "padded"])
    assert "a document or a piece of one in each" in capsys.readouterr().out or task == "sft"
    assert (tmp_path / "out" / "adapter").is_dir() and len(losses(tmp_path / "out")) == 2
