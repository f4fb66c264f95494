"""Every norm of every decoder is trained, saved, loaded and merged, whatever its class is called."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longlora_ext._routed import check_routed
from longlora_ext.adapter import load, lora_config, merge, prepare_model
from longlora_ext.adapter._norms import names_for_peft, norms_of
from merged_models import fp32_base, save_random_adapter
from tiny_models import CONFIGS, tiny_model

FULL = ["full_attention"] * 2
#: Tiny models by what their norms are like: config class, its own fields, and the norms of a layer and of the end.
FAMILIES: dict[str, tuple[str, dict, int]] = {
    "nemotron": ("NemotronConfig", {}, 2 * 2 + 1),  # LayerNorm with 1 + w, a class that is not called norm at its end
    "gemma": ("GemmaConfig", {}, 2 * 2 + 1),  # RMSNorm with 1 + w
    "olmo": ("OlmoConfig", {}, 0),  # LayerNorm without weights
    "olmo2": ("Olmo2Config", {}, 4 * 2 + 1),  # q_norm and k_norm over all heads
    "qwen3": ("Qwen3Config", {}, 4 * 2 + 1),  # q_norm and k_norm over a head
    "cohere": ("CohereConfig", {"use_qk_norm": True}, 3 * 2 + 1),  # weights of heads x head_dim
    "stablelm": ("StableLmConfig", {"qk_layernorm": True}, (2 + 4 + 2) * 2 + 1),  # a LayerNorm for each head
    "granite": ("GraniteConfig", {}, 2 * 2 + 1),
    "glm": ("GlmConfig", {}, 2 * 2 + 1),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}, 2 * 2 + 1),
    "llama4": ("Llama4TextConfig", {"num_local_experts": 2, "intermediate_size_mlp": 48, "layer_types": FULL}, 5),
}  # fmt: skip


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (kind, own, _) in FAMILIES.items():
        monkeypatch.setitem(CONFIGS, name, (getattr(transformers, kind), own))


def vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that only norms have, told by their shape or, as Cohere's have a vector for each head, by name.
    Biases and whatever else is a vector are not among them."""
    return {
        name: weight
        for name, weight in model.named_parameters()
        if name.endswith(".weight") and (weight.ndim == 1 or name.split(".")[-2].endswith("norm"))
    }


def without_peft(name: str) -> str:
    return (
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", "").replace("original_module.", "")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_trained_saved_loaded_and_merged(family: str, tmp_path: Path) -> None:
    base = fp32_base(tmp_path / "base", family)
    before = AutoModelForCausalLM.from_pretrained(base)
    norms = set(vectors(before))
    assert len(norms) == FAMILIES[family][2]
    if family == "nemotron" and Version(transformers.__version__) < Version("5.6"):
        with pytest.raises(ValueError, match="Nemotron"):
            check_routed(type(before))
        return
    adapter = save_random_adapter(base, tmp_path / "adapter")
    saved = load_file(adapter / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in norms} <= saved.keys()
    in_full = {name for name in saved if ".lora_" not in name}
    biases = {name.replace(".weight", ".bias") for name in norms} & set(dict(before.named_parameters()))
    assert {name.removeprefix("base_model.model.") for name in in_full} - norms - biases <= {
        "model.embed_tokens.weight",
        "lm_head.weight",  # where it is the embedding
    }
    merge(adapter, tmp_path / "merged")
    merged = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    again = load(adapter, attn_implementation="sdpa")
    loaded = {without_peft(name): weight for name, weight in again.named_parameters() if "original_module" not in name}
    for name in norms | biases:
        assert not saved[f"base_model.model.{name}"].equal(before.get_parameter(name))
        assert saved[f"base_model.model.{name}"].equal(merged[name]) and merged[name].equal(loaded[name])


def test_norms_that_cannot_be_told_by_their_last_name() -> None:
    """PEFT takes every module whose full name ends with one of the names, also where no dot is before that."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.norm = nn.Linear(4, 4)  # no norm, by the name of one
        layer.mlp.abnorm = nn.Linear(4, 4)
    prepared = prepare_model(model, lora_config(model))
    in_full = {name.removeprefix("base_model.model.") for name, module in prepared.named_modules()
               if isinstance(module, ModulesToSaveWrapper)}  # fmt: skip
    layers = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")]
    assert in_full == {"model.embed_tokens", "model.norm", *layers}


def test_names_are_as_short_as_they_may_be() -> None:
    model = tiny_model("qwen3")
    names = ["embed_tokens", "input_layernorm", "k_norm", "norm", "post_attention_layernorm", "q_norm"]
    assert lora_config(model).modules_to_save == names
    with pytest.raises(ValueError, match="PEFT cannot tell 0 from other modules whose names end likewise"):
        names_for_peft(nn.ModuleDict({"0": nn.LayerNorm(2), "10": nn.Linear(2, 2)}), ["0"])


class Scale(nn.Module):
    """A norm of somebody's own, which says it by nothing but its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))


def test_norms_are_found_by_what_they_are() -> None:
    model = nn.ModuleDict({"a": Scale(), "b": nn.PReLU(), "c": nn.Linear(2, 2), "d": nn.LayerNorm(2, bias=False)})
    model["e"] = nn.LayerNorm(2, elementwise_affine=False)
    assert norms_of(model) == ["a", "d"]


def test_a_norm_that_would_stay_frozen_is_refused() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.q_norm_weight = nn.Parameter(torch.ones(8))
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.q_norm_weight looks like the weight of a norm, but Llama"
    ):
        lora_config(model)
    assert lora_config(model, modules_to_save=["norm"]).modules_to_save == ["norm"]
    with pytest.raises(
        ValueError, match=r"a_norm is to be trained in full \(modules_to_save\), but PEFT leaves it fro"
    ):
        prepare_model(model, lora_config(model, modules_to_save=["norm", "a_norm"]))


def decoder(model_type: str) -> PreTrainedModel | None:
    """A decoder of that type with few layers and no numbers, if it can be made of its config's defaults."""
    try:
        config = CONFIG_MAPPING[model_type]()
        config.tie_word_embeddings = False  # which is another question
        part = config.get_text_config()
        part.num_hidden_layers = min(getattr(part, "num_hidden_layers", 4), 4)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[: part.num_hidden_layers]
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception:  # a type whose defaults make no model, or that needs a library: the test counts those that do
        return None


@pytest.mark.full
def test_the_norms_of_all_decoders_of_transformers() -> None:
    checked = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = decoder(model_type)
        if model is None:
            continue
        norms, embedding = set(vectors(model)), model.get_input_embeddings().weight
        inside = {f"{name}." for name, module in model.named_modules() if module is model.get_input_embeddings()}
        try:
            with torch.device("meta"):
                prepared = prepare_model(model, lora_config(model))
        except ValueError as error:  # it has projections of other names, or of a class of its own
            assert "pass target_modules" in str(error) or "only the following modules" in str(error), (
                model_type,
                error,
            )
            continue
        frozen = {without_peft(name) for name, weight in prepared.named_parameters() if not weight.requires_grad}
        trained = {without_peft(name): weight for name, weight in prepared.named_parameters()
                   if weight.requires_grad and ".lora_" not in name}  # fmt: skip
        assert norms <= trained.keys(), (model_type, norms - trained.keys())
        matrices = {name for name, weight in trained.items() if weight.ndim > 1 and weight.shape != embedding.shape}
        matrices -= norms
        assert not {name for name in matrices if not name.startswith(tuple(inside))}, (model_type, matrices)
        assert frozen, model_type
        checked += 1
    assert checked > 80, checked


def test_a_tiny_decoder_of_the_sweep() -> None:
    """That the sweep makes models at all."""
    assert decoder("llama") is not None and isinstance(decoder("llama").config, LlamaConfig)
