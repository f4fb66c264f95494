"""What is trained, and in which dtype: LoRA on the projections of the attention, embedding and norms."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, JetMoeConfig

from longlora_ext.adapter import lora_config, prepare_model
from small_decoders import small_config
from tiny_models import CONFIGS, SIZES, tiny_model, tokens
from tiny_training import extended_model, is_tied, save_base


@pytest.mark.parametrize("family", CONFIGS)
def test_embedding_and_norms_of_every_family_are_trained(family: str) -> None:
    model = tiny_model(family, dtype=torch.float32)
    names = {name for name, _ in model.named_parameters() if "embed" in name or "norm" in name}
    prepared = prepare_model(model, lora_config(model))
    trainable = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        for name, weight in prepared.named_parameters()
        if weight.requires_grad and "lora_" not in name
    }
    assert trainable == names
    assert any("q_norm" in name for name in names) == (family == "qwen3")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trainable_weights_are_fp32_and_the_rest_is_as_before(tmp_path: Path, tied: bool) -> None:
    model = extended_model(save_base(tmp_path, tie_word_embeddings=tied))
    before = model(tokens(1, 30)).logits
    seen = []
    model.model.layers[1].register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
    model = prepare_model(model, lora_config(model))
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    plain = model(tokens(1, 30)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(tokens(1, 30)).logits
    assert set(seen) == {torch.bfloat16}
    for after in (plain, autocast):
        assert (after.float() - before.float()).norm() < 0.02 * before.float().norm()
    assert is_tied(model) == tied
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size


def test_overrides_reach_the_lora_config() -> None:
    model = tiny_model()
    config = lora_config(model, r=4, modules_to_save=None, target_modules=["q_proj"])
    assert (config.r, config.lora_alpha, config.modules_to_save) == (4, 16, None)
    assert config.target_modules == {"q_proj"}
    assert not lora_config(tiny_model(tie_word_embeddings=True), modules_to_save=None).ensure_weight_tying


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no q_proj, k_proj, v_proj, o_proj: pass target_modules"):
        lora_config(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))
    jetmoe = AutoModelForCausalLM.from_config(JetMoeConfig(**{**SIZES, "num_hidden_layers": 1, "kv_channels": 8}))
    with pytest.raises(ValueError, match="JetMoeForCausalLM has no q_proj, k_proj, v_proj, o_proj: pass target_mod"):
        lora_config(jetmoe)  # of its projections the most are experts
    assert lora_config(jetmoe, target_modules=["kv_proj"]).target_modules == {"kv_proj"}
    model = tiny_model()
    prepared = prepare_model(model, lora_config(model))
    with pytest.raises(ValueError, match="has an adapter already"):
        prepare_model(prepared, lora_config(model))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_change_the_base_model_are_refused(start: str, tmp_path: Path) -> None:
    """No base model on a disk would be the one that the adapter is of."""
    model = extended_model(save_base(tmp_path), torch.float32)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    with pytest.raises(ValueError, match=f"init_lora_weights is '{start}', .* may be True, .*, 'eva' or 'mica'"):
        prepare_model(model, lora_config(model, init_lora_weights=start))
    assert model.model.layers[0].self_attn.q_proj.weight.equal(before)


def test_other_layers_than_those_of_the_base_model_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(
        ValueError, match=r"layer_replication is \[\[0, 2\], \[1, 2\]\], which gives the base model oth"
    ):
        prepare_model(model, lora_config(model, layer_replication=[[0, 2], [1, 2]], modules_to_save=None))
    assert len(model.model.layers) == 2


@pytest.mark.parametrize(("targets", "without"), [(["q_proj", "o_proj"], "o_proj"), ("all-linear", "mlp.down_proj")])
def test_a_bias_that_could_not_be_merged_is_refused(targets: object, without: str) -> None:
    """Qwen 2's queries have one, and its output has none."""
    model = tiny_model("qwen2")
    with pytest.raises(ValueError, match=f"these target_modules have none: model.layers.0.*{without}.* Leave it out"):
        prepare_model(model, lora_config(model, lora_bias=True, target_modules=targets))
    prepare_model(model, lora_config(model, lora_bias=True, target_modules=["q_proj", "k_proj"]))


def test_another_vocabulary_than_that_of_the_files_is_refused(tmp_path: Path) -> None:
    """Nothing would load its adapter, and that would be known after the training."""
    model = extended_model(save_base(tmp_path))
    model.resize_token_embeddings(63)
    with pytest.raises(ValueError, match=r"a vocabulary of 63 tokens, but .* has 61, and"):
        prepare_model(model, lora_config(model))
    model = extended_model(tmp_path)
    model.resize_token_embeddings(63)
    model.save_pretrained(tmp_path / "larger")
    larger = AutoModelForCausalLM.from_pretrained(tmp_path / "larger")
    assert prepare_model(larger, lora_config(larger)).get_input_embeddings().weight.shape[0] == 63
    model = extended_model(tmp_path)
    (tmp_path / "config.json").unlink()  # a folder of GGUF files has none
    prepare_model(model, lora_config(model))


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("phi3", {"qkv_proj", "o_proj"}),
        ("gpt_neox", {"query_key_value", "dense"}),
        ("phi", {"q_proj", "k_proj", "v_proj", "dense"}),
        ("lfm2", {"q_proj", "k_proj", "v_proj", "self_attn.out_proj"}),  # its convolutions have an out_proj too
        ("deepseek_v3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
    ],
)
def test_lora_goes_on_the_projections_of_the_attention(kind: str, targets: set[str]) -> None:
    model = AutoModelForCausalLM.from_config(small_config(kind))
    config = lora_config(model)
    assert config.target_modules == targets
    trained = [name for name, module in prepare_model(model, config).named_modules() if hasattr(module, "lora_A")]
    assert trained and all("attn" in name or "attention" in name for name in trained)
