"""Merging shard by shard: the merged model is the adapter model, and only a shard of it is ever in memory."""

import errno
import itertools
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import longlora_ext.adapter._merge
import merge_adapter
from app.models.fingerprint import files_fingerprint
from app.training.context import new_context
from app.training.options import ModelOptions
from longlora_ext.adapter import lora_config, merge, prepare_model, save_adapter
from longlora_ext.config import context_length, extend_config, rope_type_of
from merged_models import assert_same_logits, files_up_to, fp32_base, peak_while, save_random_adapter
from tiny_training import CONTEXT, extended_model, save_base

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama-9-heads-on-3", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("gemma", {}),
    ],
)
def test_a_merged_model_is_the_adapter_model(family: str, changes: dict, tmp_path: Path, caplog) -> None:
    base = fp32_base(tmp_path / "base", family, **changes)
    adapter = save_random_adapter(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", max_shard_size="10KB")
    assert caplog.records == []  # not by PEFT
    assert_same_logits(adapter, tmp_path / "merged", base)
    names = [
        json.loads((tmp_path / model / "model.safetensors.index.json").read_text()) for model in ("base", "merged")
    ]
    assert names[0]["weight_map"].keys() == names[1]["weight_map"].keys()
    assert len(set(names[1]["weight_map"].values())) > 3


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_rslora": True, "target_modules": EVERYWHERE},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 64}},
        {"modules_to_save": ["embed_tokens", "lm_head", "norm", "up_proj"]},
        {"modules_to_save": None},
    ],
    ids=["rslora", "patterns", "modules", "lora alone"],
)
def test_what_an_adapter_may_be(overrides: dict, tmp_path: Path, caplog) -> None:
    base = fp32_base(tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter", **overrides)
    merge(adapter, tmp_path / "merged")
    assert caplog.records == []
    assert_same_logits(adapter, tmp_path / "merged", base)


def test_what_is_more_than_single_weights_is_merged_by_peft(tmp_path: Path, caplog, monkeypatch) -> None:
    base = fp32_base(tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "dora", use_dora=True)
    merge(adapter, tmp_path / "merged")
    (record,) = [record for record in caplog.records if record.name.startswith("longlora_ext")]
    assert record.getMessage().startswith("the adapter has use_dora=True: the whole model is loaded into memory")
    assert_same_logits(adapter, tmp_path / "merged", base)
    monkeypatch.setattr(
        "longlora_ext.adapter._prepare._check_merges", lambda *_: None
    )  # as before it was refused there
    adapter = save_random_adapter(base, tmp_path / "bias", lora_bias=True)
    with pytest.raises(ValueError, match=r"PEFT cannot merge .*bias: Impossible to merge LoRA with `lora_bias=True`"):
        merge(adapter, tmp_path / "again")


def test_a_field_of_an_unknown_peft_is_not_overlooked(monkeypatch) -> None:
    from longlora_ext.adapter import _lora

    config = LoraConfig()
    assert _lora.obstacle(config) is None
    monkeypatch.setattr(_lora, "_UNDERSTOOD", _lora._UNDERSTOOD - {"lora_alpha"})  # as if it were new
    config.lora_alpha = 99
    assert _lora.obstacle(config) == "lora_alpha=99"


@pytest.mark.parametrize("sharded", [False, True])
def test_base_models_of_torch_save(sharded: bool, tmp_path: Path, caplog) -> None:
    base = fp32_base(tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter")
    state = AutoModelForCausalLM.from_pretrained(base).state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # old ones have it; it must not stay
    parts = [dict(list(state.items())[i::2]) for i in range(2)] if sharded else [state]
    files = [f"part-{i}.bin" for i in range(2)] if sharded else ["pytorch_model.bin"]
    for path in base.glob("model*"):
        path.unlink()
    for part, file in zip(parts, files, strict=True):
        torch.save(part, base / file)
    if sharded:
        file_of = {name: file for part, file in zip(parts, files, strict=True) for name in part}
        index = {"metadata": {}, "weight_map": file_of}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    merge(adapter, tmp_path / "merged")
    assert caplog.records == [] and "inv_freq" not in str(list(load_file(tmp_path / "merged/model.safetensors")))
    assert_same_logits(adapter, tmp_path / "merged", base)


def test_dtypes_configs_and_what_lies_beside(tmp_path: Path) -> None:
    base = fp32_base(tmp_path / "base")
    GenerationConfig(eos_token_id=2, temperature=0.5, do_sample=True).save_pretrained(base)
    adapter = save_random_adapter(base, tmp_path / "adapter")
    (adapter / "run.json").write_text('{"arguments": []}')
    merge(adapter, tmp_path / "merged", dtype="bfloat16")
    assert (tmp_path / "merged/run.json").read_text() == '{"arguments": []}'
    assert {weight.dtype for weight in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16 and model.generation_config.temperature == 0.5
    assert model.config.max_position_embeddings == CONTEXT and model.config.rope_parameters["factor"] == 4.0
    assert (tmp_path / "merged/tokenizer.json").is_file()
    assert "s2attn" not in (tmp_path / "merged/config.json").read_text()
    with pytest.raises(ValueError, match=r"dtype must be a floating-point dtype .* but it is 'int3'"):
        merge(adapter, tmp_path / "again", dtype="int3")
    with pytest.raises(TypeError, match="unexpected argument 'device_map'"):
        merge(adapter, tmp_path / "again", device_map="auto")


#: Options that transformers would ignore, as Vicuna's file has them.
IGNORED = {"_from_model_config": True, "eos_token_id": 2, "max_length": 4096, "temperature": 0.9, "top_p": 0.6}


@pytest.mark.parametrize("how", ["by shards", "by PEFT", "full fine-tuning"])
def test_generation_options_that_transformers_would_not_save(how: str, tmp_path: Path, monkeypatch) -> None:
    """After 5.20.2 it saves them if they are as they were read, and all that it reads here looks changed."""
    changing = itertools.count()
    monkeypatch.setattr(GenerationConfig, "__hash__", lambda config: next(changing))
    base = fp32_base(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(IGNORED))
    if how == "full fine-tuning":
        model = prepare_model(extended_model(base), None)
        model.save_pretrained(tmp_path / "checkpoint")  # as the Trainer does
        save_adapter(model, tmp_path / "made")
    else:
        merge(save_random_adapter(base, tmp_path / "adapter", use_dora=how == "by PEFT"), tmp_path / "made")
    saved = json.loads((tmp_path / "made/generation_config.json").read_text())
    assert {name: value for name, value in saved.items() if name != "transformers_version"} == IGNORED


@pytest.mark.parametrize("dora", [False, True], ids=["by shards", "by PEFT"])
def test_a_merged_model_of_dynamic_rope_knows_its_context(dora: bool, tmp_path: Path) -> None:
    """`max_position_embeddings` cannot tell it: beyond that transformers scales."""
    base = fp32_base(tmp_path / "base")
    config = extend_config(AutoConfig.from_pretrained(base), CONTEXT, rope_type="dynamic")
    model = AutoModelForCausalLM.from_pretrained(base, config=config, attn_implementation="s2attn")
    save_adapter(prepare_model(model, lora_config(model, use_dora=dora)), tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoConfig.from_pretrained(tmp_path / "merged")
    assert (merged.max_position_embeddings, context_length(merged)) == (64, CONTEXT)
    assert not hasattr(merged, "s2attn_group_size") and rope_type_of(merged) == "dynamic"
    trained_on = new_context(merged, ModelOptions(context_length=CONTEXT))
    assert trained_on.rope_parameters == merged.rope_parameters


def test_a_merged_model_says_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command makes it again, from any folder."""
    monkeypatch.chdir(tmp_path)
    base = fp32_base(tmp_path / "base").rename("moved")
    adapter = save_random_adapter(base, tmp_path / "adapter")
    merge_adapter.main(["adapter", "merged", "--base_model", "moved", "--dtype", "bfloat16"])
    made = json.loads(Path("merged/merge.json").read_text())
    assert made["adapter"] == {"name": str(adapter), "fingerprint": files_fingerprint(str(adapter))}
    assert made["base_model"]["name"] == str(tmp_path / "moved")
    assert made["base_model"]["fingerprint"] == files_fingerprint("moved") != files_fingerprint("merged")
    assert made["versions"]["torch"] == torch.__version__ and {"commit", "date"} < made.keys()
    python, program, *words = shlex.split(made["command"])
    assert python == "python" and program == merge_adapter.__file__ and words == made["arguments"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    merge_adapter.main(words)
    again, first = (load_file(folder / "model.safetensors") for folder in (Path("OUTPUT_FOLDER"), tmp_path / "merged"))
    assert again.keys() == first.keys() and all(again[name].equal(weight) for name, weight in first.items())
    (adapter / "longlora.json").write_text("{}")
    assert files_fingerprint(str(adapter)) != made["adapter"]["fingerprint"]


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Peak memory of the process (VmHWM) while it merges, with small shards and with one of the whole model."""
    base = save_base(tmp_path / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=24)
    adapter = save_random_adapter(base, tmp_path / "adapter", target_modules=EVERYWHERE)
    size = (base / "model.safetensors").stat().st_size
    merge(adapter, tmp_path / "warm-up", max_shard_size="8MB")  # what is loaded once
    peaks = {shard: peak_while(lambda shard=shard: merge(adapter, tmp_path / shard, max_shard_size=shard))
             for shard in ("8MB", "1GB")}  # fmt: skip
    assert len(list((tmp_path / "8MB").glob("*.safetensors"))) > 10
    assert peaks["8MB"] < size / 2 < size < peaks["1GB"], peaks


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    base = fp32_base(tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter")
    there = {path.name for path in tmp_path.iterdir()}
    with files_up_to(50_000), pytest.raises(OSError, match=r"cannot write .*merged: .*[Ff]ile too large"):
        merge(adapter, tmp_path / "merged")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(longlora_ext.adapter._merge.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"cannot write .*merged: .*it takes 0.1 MB, and 0.0 MB are free"):
        merge(adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == there


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    base = fp32_base(tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.model.norm.weight"].fill_(1e6)  # more than float16 has
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.norm.weight is not finite once it is merged, in torch.float16"):
        merge(adapter, tmp_path / "merged", dtype=torch.float16)
    assert not (tmp_path / "merged").exists()


def test_a_disk_that_is_full_is_not_a_model_without_weights(tmp_path: Path, monkeypatch) -> None:
    """Nor are the weights taken out of another file that is there as well."""
    base = fp32_base(tmp_path / "base")
    torch.save({}, base / "pytorch_model.bin")
    adapter = save_random_adapter(base, tmp_path / "adapter")

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("longlora_ext.adapter._checkpoint.cached_file", full)
    with pytest.raises((ValueError, OSError), match="No space left on device"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
