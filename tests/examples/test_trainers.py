"""The pieces in other people's trainers: examples/trainers, each short, and it runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import forks
from finetune_runs import ROOT, environment
from longlora_ext.adapter import load
from longlora_ext.config import context_length

FOLDER = ROOT / "examples" / "trainers"
TEXT = sorted((ROOT / "examples" / "app").glob("*/f*.py"))[:6]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def check_adapter(folder: Path) -> Any:
    model: Any = load(folder)
    assert context_length(model.get_base_model().config) == 1024
    lora = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert lora and all(weight.any() for weight in lora)  # they begin as zeros
    return model


@pytest.mark.parametrize("name", ["plain_pytorch", "accelerate_fsdp", "trl_sft"])
def test_an_example_is_short(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert "longlora_ext._" not in text and "from app" not in text  # nothing private


def test_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plain_pytorch

    monkeypatch.setattr(plain_pytorch, "STEPS", 2)
    monkeypatch.setattr(plain_pytorch, "TEXT", TEXT)
    losses = plain_pytorch.main(str(tmp_path / "adapter"))
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    check_adapter(tmp_path / "adapter")


def test_accelerate_with_fsdp(tmp_path: Path) -> None:
    """Two processes: what is saved is all of it, and the same as what one process trains on the same rows."""
    code = (
        "import os, sys; from pathlib import Path; import accelerate_fsdp as example; example.STEPS = 2; "
        f"example.TEXT = [Path(name) for name in {list(map(str, TEXT))!r}]; save = example.save_adapter; "
        "kind = lambda model: type(next(model.parameters())).__name__.encode(); "
        "example.save_adapter = lambda model, *a: os.write(1, kind(model) + b';') and save(model, *a); "
        "example.main(sys.argv[1])"
    )
    with_examples = {**environment(), "PYTHONPATH": f"{FOLDER}:{environment()['PYTHONPATH']}"}
    done = forks.run(["-c", code, tmp_path / "adapter"], with_examples, processes=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert re.findall(r"step \d", done.stdout) == ["step 1", "step 2"]
    assert done.stdout.count("DTensor;") == 2  # each process holds its shard; two write to one pipe, so not in lines
    model = check_adapter(tmp_path / "adapter")
    embedding = model.get_base_model().get_input_embeddings().modules_to_save["default"].weight
    assert embedding.shape == (model.config.vocab_size, model.config.hidden_size)


def test_trl_packs_documents_that_do_not_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="the extra trl is not installed")
    import trl_sft

    monkeypatch.setattr(trl_sft, "STEPS", 2)
    monkeypatch.setattr(trl_sft, "TEXT", TEXT)
    tokenizer = AutoTokenizer.from_pretrained(trl_sft.MODEL)
    rows = [{"text": file.read_text(encoding="utf-8")[:800]} for file in TEXT]
    trainer = trl_sft.train(str(tmp_path / "adapter"), Dataset.from_list(rows), tokenizer)
    check_adapter(tmp_path / "adapter")
    assert trainer.state.global_step == 2

    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 1
    ids = batch["input_ids"]
    ends = [*starts[1:], ids.shape[1]]
    model: Any = trainer.model.train()
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(input_ids=ids[:, a:b], use_cache=False).logits for a, b in zip(starts, ends, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-3, atol=1e-3)


TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }};{% endgeneration %}{% else %}{{ message.content }};{% endif %}{% endfor %}"
)


def test_trl_learns_from_answers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="the extra trl is not installed")
    import trl_sft

    monkeypatch.setattr(trl_sft, "STEPS", 2)  # the first one's learning rate is 0
    tokenizer = AutoTokenizer.from_pretrained(trl_sft.MODEL)
    tokenizer.chat_template = TEMPLATE
    talks = [
        [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n * n}"}]
        for n in range(8)
    ]
    dataset = Dataset.from_list([{"messages": talk} for talk in talks])
    trainer = trl_sft.train(str(tmp_path / "adapter"), dataset, tokenizer, assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = tokenizer.decode(batch["input_ids"][batch["labels"] != -100])
    assert "answer" in learned and "question" not in learned and "user" not in learned
    check_adapter(tmp_path / "adapter")


def test_a_folder_that_names_its_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/other_trainers.md writes for trainers that are configured in YAML: the model attends by S2-Attn, and
    an adapter of PEFT's own merges into a model with the longer context."""
    page = (ROOT / "docs" / "other_trainers.md").read_text(encoding="utf-8")
    prepare, merge = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "from_pretrained(" in block)
    shutil.copytree(ROOT / "examples" / "tiny_llama", tmp_path / "llama-32768")
    monkeypatch.chdir(tmp_path)
    exec(prepare.replace(" 32768,", " 1024,"), {})
    config = AutoConfig.from_pretrained("llama-32768")
    model: Any = AutoModelForCausalLM.from_pretrained("llama-32768", config=config)  # as LLaMA-Factory does
    assert model.config._attn_implementation == "s2attn" and model.config.s2attn_group_size == 256
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])).train()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        adapted(input_ids=torch.arange(600)[None], use_cache=False)
    layers = model.config.num_hidden_layers
    assert {event.key: event.count for event in seen.key_averages()}["longlora::s2attn"] == layers
    adapted.save_pretrained("out")
    exec(merge, {})
    merged = AutoConfig.from_pretrained("merged")
    assert (merged._attn_implementation, merged.max_position_embeddings) == (None, 1024)
    assert merged.rope_parameters["factor"] == 4
