"""What the original LongLoRA wrote becomes an adapter of ours: shown on a release of a tiny model, made here."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import import_longlora as example
from longlora_ext.adapter import import_longlora, load, merge
from longlora_ext.config import extend_config
from merged_models import files_up_to
from tiny_models import VOCABULARY, tokens
from tiny_training import CONTEXT, save_base


def original_model(base: Path) -> PreTrainedModel:
    """The base model as the original has it: RoPE scaled, and a padding token added, which is the mean of all."""
    config = AutoConfig.from_pretrained(base)
    config.max_position_embeddings, config.rope_parameters = CONTEXT, extend_config(config, CONTEXT).rope_parameters
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        embedding.weight.data[-1] = embedding.weight.data[:-1].mean(dim=0)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base model `base` and the release `longlora`, as the original's two scripts leave it."""
    folder = tmp_path_factory.mktemp("release")
    base = save_base(folder / "base", tie_word_embeddings=request.param)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
    model = get_peft_model(original_model(base), lora)
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad or "embed" in name or "norm" in name)
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
    everything = model.state_dict()
    (folder / "longlora").mkdir()
    is_lora = {name: "lora" in name for name in everything}
    torch.save(
        {name.replace("default.", ""): weight for name, weight in everything.items() if is_lora[name]},
        folder / "longlora/adapter_model.bin",
    )
    trained = {name: w for name, w in everything.items() if not is_lora[name] and ("embed" in name or "norm" in name)}
    assert all(name.startswith("base_model.model.") for name in trained)
    torch.save({name[17:]: weight for name, weight in trained.items()}, folder / "longlora/trainable_params.bin")
    description = {  # what PEFT wrote in 2023, and nothing that came later
        "auto_mapping": None, "base_model_name_or_path": str(base), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "lora_alpha": 16, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": 8, "revision": None,
        "target_modules": targets, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "longlora/adapter_config.json").write_text(json.dumps(description))
    return folder


def original_logits(release: Path, ids: torch.Tensor) -> torch.Tensor:
    """As the original's merging script puts its files together."""
    model = original_model(release / "base")
    trained = torch.load(release / "longlora/trainable_params.bin", weights_only=True)
    assert trained["model.embed_tokens.weight"].shape[0] == VOCABULARY + 1
    assert not model.load_state_dict(trained, strict=False).unexpected_keys
    merged = PeftModel.from_pretrained(model, release / "longlora").merge_and_unload()
    return merged(ids).logits[..., :VOCABULARY].detach()


def test_the_imported_model_is_the_original_one(release: Path, tmp_path: Path, capsys, caplog) -> None:
    ids = tokens(2, 150)
    arguments = [release / "longlora", tmp_path / "adapter", "--context_length", CONTEXT]
    example.main([*map(str, arguments)])
    assert capsys.readouterr().out == f"imported: {tmp_path / 'adapter'}\n"
    assert caplog.messages == [
        "model.embed_tokens.weight has 62 rows, and the vocabulary of the base model 61 tokens: what the original "
        "added, for padding, is left out"
    ]
    model = load(tmp_path / "adapter", dtype=torch.float32)
    want = original_logits(release, ids)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
    assert model.config.vocab_size == VOCABULARY and model.config.s2attn_group_size == CONTEXT // 4
    merge(tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)
    assert merged.config.rope_parameters["factor"] == 4.0
    made = json.loads((tmp_path / "merged/import.json").read_text())
    base_model = f"--base_model={release / 'base'}"
    assert made["arguments"] == [str(arguments[0]), "OUTPUT_FOLDER", base_model, f"--context_length={CONTEXT}"]
    assert made["adapter"]["fingerprint"].startswith("sha256:") and "import_longlora.py" in made["command"]
    base = AutoModelForCausalLM.from_pretrained(release / "base", dtype=torch.float32)
    assert (base(ids).logits - want).abs().max() > 0.1


def test_an_import_knows_its_base_model(release: Path, tmp_path: Path) -> None:
    import_longlora(release / "longlora", tmp_path / "adapter", context_length=CONTEXT)
    card = (tmp_path / "adapter/README.md").read_text()
    assert f"# base, {CONTEXT} tokens" in card and "rank 8, alpha 16" in card
    tied = AutoConfig.from_pretrained(release / "base").tie_word_embeddings
    other = save_base(tmp_path / "other", seed=1, tie_word_embeddings=tied)
    with pytest.raises(ValueError, match="it has the same shape but other weights"):
        load(tmp_path / "adapter", base_model=str(other))


def test_lora_alone_is_imported(release: Path, tmp_path: Path) -> None:
    shutil.copytree(release / "longlora", tmp_path / "longlora")
    (tmp_path / "longlora/trainable_params.bin").unlink()
    import_longlora(tmp_path / "longlora", tmp_path / "adapter", context_length=CONTEXT)
    model = load(tmp_path / "adapter", dtype=torch.float32)
    assert model.peft_config["default"].modules_to_save is None
    assert model(tokens(1, 90)).logits.isfinite().all()


def test_a_disk_that_is_full_leaves_nothing(release: Path, tmp_path: Path, capsys) -> None:
    arguments = [release / "longlora", tmp_path / "adapter", "--context_length", CONTEXT]
    with files_up_to(10_000), pytest.raises(SystemExit, match="2"):
        example.main([*map(str, arguments)])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"error: cannot write .*adapter: .*file too large", line, re.IGNORECASE)
    assert list(tmp_path.iterdir()) == []


class Code:
    def __reduce__(self) -> tuple:
        return print, ("code ran",)


def test_what_does_not_fit_is_refused(release: Path, tmp_path: Path, capsys) -> None:
    def refused(*options: object, **files: object) -> str:
        """The one line with which the example refuses, with some of the release's files replaced."""
        folder = tmp_path / "longlora"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(release / "longlora", folder)
        for name, content in files.items():
            path = folder / f"{name}.bin"
            torch.save(content, path) if content is not None else path.unlink()
        arguments = [folder, tmp_path / "adapter", *(options or ("--context_length", CONTEXT))]
        with pytest.raises(SystemExit, match="2"):
            example.main([*map(str, arguments)])
        assert not (tmp_path / "adapter").exists()
        printed = capsys.readouterr()
        assert "code ran" not in printed.out and printed.err.count("\n") == 1
        return printed.err

    trained = torch.load(release / "longlora/trainable_params.bin", weights_only=True)
    embedding = trained["model.embed_tokens.weight"]
    assert "it is no adapter of the original" in refused(adapter_model=None)
    assert "more in it than tensors" in refused(trainable_params=Code())
    assert "no file of tensors by name" in refused(trainable_params=[1, 2])
    wide = {"model.embed_tokens.weight": embedding.repeat(1, 2)}
    assert "trainable_params.bin does not fit" in refused(trainable_params=wide)
    long = {"model.embed_tokens.weight": embedding.repeat(3, 1)}
    assert "size [186, 32], and the model has [61, 32]" in refused(trainable_params=long)
    assert "has no such weight" in refused(trainable_params={"model.layers.7.input_layernorm.weight": torch.ones(32)})
    lora = torch.load(release / "longlora/adapter_model.bin", weights_only=True)
    halves = {name: weight for name, weight in lora.items() if "lora_A" in name}
    lacks = "it has no model.layers.0.self_attn.k_proj.lora_B.weight, model.layers.0.self_attn.o_proj.lora_B.weight, "
    assert lacks in refused(adapter_model=halves) and "adapter_model.bin is incomplete" in refused(adapter_model={})
    without = {name: weight for name, weight in lora.items() if "layers.1.self_attn.v_proj" not in name}
    assert "v_proj.lora_A.weight, model.layers.1.self_attn.v_proj.lora_B.weight" in refused(adapter_model=without)
    broken = lora | {next(iter(lora)): torch.full_like(next(iter(lora.values())), torch.nan)}
    assert "adapter_model.bin holds weights that are not finite" in refused(adapter_model=broken)
    broken = trained | {"model.norm.weight": torch.full((32,), torch.inf)}
    assert "weights that are not finite: model.norm.weight" in refused(trainable_params=broken)
    factor = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}
    assert "adapter_model.bin does not fit" in refused(adapter_model=factor)
    message = refused("--context_length", 0)
    assert "context_length must be" in message and "base model" not in message
    assert "context_length must be" in refused("--context_length", 64)
    assert "cannot load the base model nowhere/x" in refused("--context_length", 256, "--base_model", "nowhere/x")
