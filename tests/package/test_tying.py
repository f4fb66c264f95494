"""Whether the output layer is the embedding is asked of the weights, whatever the config says of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune_runs import make_model, make_text, run, small_run
from longlora_ext.adapter import load, load_base, merge, prepare_model, save_adapter
from longlora_ext.config import extend_config
from merged_models import assert_same_logits, fp32_base, save_random_adapter
from tiny_models import tokens
from tiny_training import CONTEXT, extended_model, save_base, train

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def give_output(base: Path, like: float) -> Path:
    """Put an output layer into a file whose config says that it is the embedding: the same, times that."""
    weights = load_file(base / "model.safetensors")
    weights[OUTPUT] = like * weights[EMBEDDING]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert says_tied(base)
    return base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """What merging with PEFT makes of a tied model: its config says so still, its file holds two."""
    return give_output(save_base(tmp_path / "base", tie_word_embeddings=True), -1.0)


def says_tied(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def extended(base: Path, how: str) -> PreTrainedModel:
    if how == "transformers":
        return extended_model(base)
    config = extend_config(AutoConfig.from_pretrained(base), CONTEXT)
    return load_base(str(base), config=config, attn_implementation="s2attn")


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.float().eval()(tokens(2, 150)).logits


@pytest.mark.parametrize("how", ["transformers", "load_base"])
def test_both_are_saved_after_full_fine_tuning(how: str, base: Path, tmp_path: Path) -> None:
    model = prepare_model(extended(base, how), None)
    train(model)
    model.save_pretrained(tmp_path / "checkpoint")  # as the Trainer does
    save_adapter(model, tmp_path / "model")
    for folder in (tmp_path / "checkpoint", tmp_path / "model"):
        saved = load_file(folder / "model.safetensors")
        assert saved[OUTPUT].equal(model.lm_head.weight) and saved[EMBEDDING].equal(model.model.embed_tokens.weight)
        assert not says_tied(folder) and saved[OUTPUT].dtype == torch.float32
        torch.testing.assert_close(logits_of(load(folder)), logits_of(model), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["by shards", "by PEFT"])
def test_an_adapter_of_untied_weights(how: str, base: Path, tmp_path: Path, caplog) -> None:
    adapter = save_random_adapter(base, tmp_path / "adapter", use_dora=how == "by PEFT")
    assert not any(OUTPUT in name for name in load_file(adapter / "adapter_model.safetensors"))
    model = load(adapter, dtype=torch.float32, attn_implementation="sdpa")
    assert model.lm_head.weight.equal(load_file(base / "model.safetensors")[OUTPUT].float())
    merge(adapter, tmp_path / "merged", dtype="float32")
    assert len([record for record in caplog.records if record.name.startswith("longlora_ext")]) == (how == "by PEFT")
    assert not says_tied(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=1e-4, atol=1e-4)


def test_half_of_a_tied_weight_is_untied_by_merging(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_random_adapter(base, tmp_path / "adapter", ensure_weight_tying=False)
    want = logits_of(load(adapter, dtype=torch.float32, attn_implementation="sdpa"))
    merge(adapter, tmp_path / "merged", dtype="float32")
    assert not says_tied(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_lora_on_one_side_of_a_tied_weight(layer: str, tmp_path: Path) -> None:
    """PEFT would add it to both."""
    base = fp32_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_random_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj", layer], modules_to_save=None, init_lora_weights=False
    )
    merge(adapter, tmp_path / "merged")
    assert not says_tied(tmp_path / "merged")
    assert_same_logits(adapter, tmp_path / "merged", base)


def test_the_same_twice_in_a_file_is_tied(tmp_path: Path, caplog) -> None:
    base = give_output(save_base(tmp_path / "base", tie_word_embeddings=True), 1.0)
    adapter = save_random_adapter(base, tmp_path / "adapter")
    want = logits_of(load(adapter, dtype=torch.float32, attn_implementation="sdpa"))
    merge(adapter, tmp_path / "merged", dtype="float32")
    assert says_tied(tmp_path / "merged") and OUTPUT not in load_file(tmp_path / "merged/model.safetensors")
    assert not [record for record in caplog.records if record.name.startswith("longlora_ext")]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits_of(merged), want, rtol=1e-4, atol=1e-4)


def test_the_same_twice_is_two_where_the_config_says_so(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=False)
    weights = load_file(base / "model.safetensors")
    save_file(weights | {OUTPUT: weights[EMBEDDING].clone()}, base / "model.safetensors", metadata={"format": "pt"})
    model = prepare_model(extended_model(base), None)
    train(model)
    save_adapter(model, tmp_path / "model")
    saved = load_file(tmp_path / "model/model.safetensors")
    assert not saved[OUTPUT].equal(saved[EMBEDDING]) and not says_tied(tmp_path / "model")
    merge(save_random_adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged[OUTPUT].equal(weights[EMBEDDING]) and not merged[EMBEDDING].equal(weights[EMBEDDING])


def test_an_adapter_of_a_tied_weight_needs_one(base: Path, tmp_path: Path) -> None:
    """Though the configs are the same, and all weights that do not train."""
    weights = load_file(base / "model.safetensors")
    tied = save_base(tmp_path / "tied", tie_word_embeddings=True)
    del weights[OUTPUT]
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    adapter = save_random_adapter(tied, tmp_path / "adapter")
    for use in (load, lambda folder, **options: merge(folder, tmp_path / "merged", **options)):
        with pytest.raises(ValueError, match="not the base model of this adapter: its output layer is not its embed"):
            use(adapter, base_model=str(base))


def test_adapters_of_before_the_weights_were_asked(base: Path, tmp_path: Path) -> None:
    adapter = save_random_adapter(base, tmp_path / "adapter")
    record = json.loads((adapter / "longlora.json").read_text())
    assert record["base_shape"]["tie_word_embeddings"] is False
    record["base_shape"]["tie_word_embeddings"] = True  # what the config says
    (adapter / "longlora.json").write_text(json.dumps(record))
    assert load(adapter).config.tie_word_embeddings is False
    merge(adapter, tmp_path / "merged")


@pytest.mark.full
def test_a_run_of_all_weights_goes_on(tmp_path: Path) -> None:
    base, text = give_output(make_model(tmp_path / "base"), -1.0), make_text(tmp_path / "text.jsonl")
    arguments = [*small_run(base, text, tmp_path / "run", steps=2), "--eval_tokens", "0", "--full_finetune"]
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    saved = load_file(tmp_path / "run/model/model.safetensors")
    assert not saved[OUTPUT].equal(load_file(base / "model.safetensors")[OUTPUT]) and not says_tied(
        tmp_path / "run/model"
    )
    arguments[arguments.index("--max_steps") + 1] = "4"
    further = run(*arguments, "--resume_from_checkpoint", "latest")
    assert further.returncode == 0, further.stderr
    assert "missing keys" not in further.stderr
    assert not load_file(tmp_path / "run/model/model.safetensors")[OUTPUT].equal(saved[OUTPUT])
