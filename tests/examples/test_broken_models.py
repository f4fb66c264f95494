"""Folders that are damaged or incomplete: loading and merging refuse them alike, in a line that says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import import_longlora
import merge_adapter
from app.runs import launch
from longlora_ext._folders import appearing
from longlora_ext.adapter import load, merge, save_adapter
from longlora_ext.adapter._load import load_base
from merged_models import assert_same_logits, fp32_base, save_random_adapter
from tiny_training import save_base

ADAPTER, BASE = "adapter_model.safetensors", "model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base model `base` in one file and `adapter`."""
    folder = tmp_path_factory.mktemp("whole")
    save_random_adapter(save_base(folder / "base"), folder / "adapter")
    return folder


@pytest.fixture
def models(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    rewrite_json(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


def rewrite_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(file: Path, drop: str | None = None, **changes: float) -> None:
    """Drop a tensor of a file, or fill tensors with a number."""
    tensors = {name: weight for name, weight in load_file(file).items() if name != drop}
    for name, number in changes.items():
        tensors[name] = torch.full_like(tensors[name], number)
    save_file(tensors, file, metadata={"format": "pt"})


def without_names(adapter: Path) -> None:
    """As older versions wrote the record."""
    record = json.loads((adapter / "longlora.json").read_text())
    del record["tensors"]
    (adapter / "longlora.json").write_text(json.dumps(record))


def refused(models: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The line with which the program refuses to merge, which is one of no more than a line."""
    with pytest.raises(SystemExit, match="2"):
        merge_adapter.main([str(models / "adapter"), str(models / "merged"), *options])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("merge_adapter.py: error: ")]
    assert len(errors) == 1 and not (models / "merged").exists()
    return errors[0]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_base_model_without_some_weights(name: str, models: Path, capsys) -> None:
    rewrite(models / "base" / BASE, drop=name)
    for attempt in (
        lambda: load_base(str(models / "base")),
        lambda: load(models / "adapter"),
        lambda: merge(models / "adapter", models / "merged"),
    ):
        with pytest.raises(ValueError, match=rf"the base model .*base is incomplete: its files have no {name}"):
            attempt()


def test_a_model_without_some_weights(whole: Path, tmp_path: Path) -> None:
    """A folder of full fine-tuning; tied weights are no missing ones."""
    shutil.copytree(whole / "base", tmp_path / "model")
    rewrite(tmp_path / "model" / BASE, drop="lm_head.weight")
    with pytest.raises(ValueError, match=r"the model .*model is incomplete: its files have no lm_head.weight"):
        load(tmp_path / "model")
    assert load(save_base(tmp_path / "tied", tie_word_embeddings=True))


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", [f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"])
def test_an_adapter_with_half_a_pair(name: str, older: bool, models: Path) -> None:
    rewrite(models / "adapter" / ADAPTER, drop=name)
    if older:
        without_names(models / "adapter")
    for attempt in (load, lambda adapter: merge(adapter, models / "merged")):
        with pytest.raises(ValueError, match=rf"{ADAPTER} is incomplete: it has no {name}"):
            attempt(models / "adapter")


def test_an_adapter_that_lacks_what_was_saved(models: Path) -> None:
    file = models / "adapter" / ADAPTER
    weights = {name: weight for name, weight in load_file(file).items() if name != NORM and Q_PROJ not in name}
    save_file(weights, file, metadata={"format": "pt"})
    lacks = rf"{ADAPTER} is incomplete: it has no {Q_PROJ}.lora_A.weight, {Q_PROJ}.lora_B.weight, {NORM}"
    for attempt in (load, lambda adapter: merge(adapter, models / "merged")):
        with pytest.raises(ValueError, match=lacks):
            attempt(models / "adapter")
    without_names(models / "adapter")
    with pytest.raises(ValueError, match=rf"cannot load .*{ADAPTER}"):  # no traceback of PEFT's KeyError
        load(models / "adapter")


def test_an_adapter_whose_config_names_other_modules(models: Path) -> None:
    rewrite_json(models / "adapter/adapter_config.json", target_modules=["nope"])
    for attempt in (load, lambda adapter: merge(adapter, models / "merged")):
        with pytest.raises(ValueError, match=rf"cannot load .*{ADAPTER} as adapter_config.json .*[Tt]arget.modules"):
            attempt(models / "adapter")


@pytest.mark.parametrize("dora", [False, True], ids=["by shards", "by PEFT"])
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_merging_looks_at_every_weight(where: str, dora: bool, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter", use_dora=dora)
    name = {"base": "model.layers.1.mlp.up_proj.weight", "adapter": NORM}[where]
    rewrite(tmp_path / where / {"base": BASE, "adapter": ADAPTER}[where], **{name: torch.nan})
    with pytest.raises(ValueError, match=rf"{name.removeprefix('base_model.model.')} is not finite once it is merged"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nothing_broken_is_saved(whole: Path, tmp_path: Path) -> None:
    model = load(whole / "adapter")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    broken = model.get_base_model().model.norm.weight.requires_grad_(True)
    broken.data[3] = torch.inf
    with pytest.raises(ValueError, match=r"not finite, as the training diverged; nothing is saved: .*norm"):
        save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_base_model_whose_files_name_weights_otherwise(tmp_path: Path, caplog) -> None:
    """One saved as `LlamaModel`, without the head that is tied to the embedding, is merged a file at a time."""
    base = fp32_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_random_adapter(base, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for file in base.glob("model*"):
        file.unlink()
    model.model.save_pretrained(base)
    assert "norm.weight" in load_file(base / BASE)
    merge(adapter, tmp_path / "merged")
    assert "the whole model is loaded into memory" not in caplog.text
    assert_same_logits(adapter, tmp_path / "merged", base)


def test_what_is_known_of_a_base_model(whole: Path, tmp_path: Path) -> None:
    """Of an adapter that trains no embedding: models that come of one another may share it, and the head."""
    adapter = save_random_adapter(whole / "base", tmp_path / "adapter", modules_to_save=None)
    shutil.copytree(whole / "base", tmp_path / "other")
    rewrite(tmp_path / "other" / BASE, **{"model.layers.0.self_attn.q_proj.weight": 0.1})
    with pytest.raises(ValueError, match=r"other weights \(model.layers.0.self_attn.q_proj.weight\)"):
        load(adapter, base_model=str(tmp_path / "other"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("base/model.safetensors", POINTER, "model.safetensors is a git-LFS pointer, not the file: run git lfs pull"),
        ("base/pytorch_model.bin", POINTER, "pytorch_model.bin is a git-LFS pointer, not the file: run git lfs pull"),
        (f"adapter/{ADAPTER}", POINTER, f"{ADAPTER} is a git-LFS pointer, not the file: run git lfs pull"),
        ("base/pytorch_model.bin", b"", "cannot load the base model"),
        ("base/pytorch_model.bin", bytes(range(256)) * 9, "cannot load the base model"),
        ("base/config.json", b"[]", "cannot load the base model"),
        ("base/config.json", b'{"model_type": "llama", "hidden_size": "x"}', "cannot load the base model"),
        ("adapter/adapter_config.json", b"[]", "cannot load .*adapter_config.json"),
        ("adapter/adapter_config.json", b'{"peft_type": 3}', "cannot load .*adapter_config.json"),
        ("adapter/longlora.json", {"rope_parameters": [3]}, r"longlora.json is damaged: rope_parameters is '\[3\]'"),
        ("adapter/longlora.json", {"base_weights": {"model.norm.weight": 3}}, "longlora.json is damaged: base_weights"),
        ("adapter/longlora.json", {"tensors": 3}, "longlora.json is damaged: tensors"),
        ("adapter/longlora.json", {"rope_parameters": {"rope_type": 5}}, "cannot load the base model"),
        ("adapter/adapter_config.json", {"base_model_name_or_path": 5}, "does not say which base model"),
        ("adapter/adapter_config.json", {"rank_pattern": 5}, f"cannot load .*{ADAPTER} as adapter_config.json"),
        ("adapter/adapter_config.json", {"lora_alpha": "x"}, f"cannot load .*{ADAPTER} as adapter_config.json"),
    ],
)
def test_what_is_damaged_is_told_in_a_line(file: str, content: Any, message: str, models: Path, capsys) -> None:
    if file.endswith(".bin"):
        (models / "base" / BASE).unlink()
    rewrite_json(models / file, **content) if isinstance(content, dict) else (models / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as told:
        load(models / "adapter")
    assert "weights_only" not in str(told.value)
    with pytest.raises(ValueError, match=message) as told:
        merge(models / "adapter", models / "merged")
    assert "weights_only" not in str(told.value)
    refused(models, capsys)


def test_what_comes_along_and_is_damaged(models: Path, capsys) -> None:
    (models / "adapter/generation_config.json").write_text("[3]")
    assert "cannot load generation_config.json of" in refused(models, capsys)
    (models / "base/tokenizer.json").write_bytes(POINTER)
    assert "cannot load the tokenizer of" in refused(models, capsys)


def test_a_base_model_without_files(models: Path, capsys) -> None:
    (models / "base" / BASE).unlink()
    assert "base: it has no weights, neither model.safetensors nor pytorch_model.bin" in refused(models, capsys)


@pytest.mark.parametrize("size", ["infGB", "5XB", "GB", "0", "-5GB", "five"])
def test_sizes_that_are_none(size: str, whole: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    line = refused(tmp_path, capsys, f"--max_shard_size={size}")
    assert f"bytes, or a number with KB, MB, GB or TB like 5GB, but it is '{size}'" in line


def test_more_processes_than_one_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(launch, "WORLD_SIZE", 2)
    for program, arguments in ((merge_adapter, ["a", "b"]), (import_longlora, ["a", "b", "--context_length=64"])):
        with pytest.raises(SystemExit, match="2"):
            program.main(arguments)
        assert "start it with python" in capsys.readouterr().err


# Output folders ---------------------------------------------------------------------------------------------


def test_a_link_as_output(models: Path, capsys) -> None:
    (models / "merged").symlink_to("nowhere")
    assert "merged is a link to nowhere, which does not exist" in refused(models, capsys)
    (models / "nowhere").mkdir()
    merge(models / "adapter", models / "merged")
    assert (models / "nowhere" / BASE).is_file() and (models / "merged").is_symlink()


KILLED = """
import os, signal, sys
from pathlib import Path
from longlora_ext._folders import appearing
with appearing(Path(sys.argv[1])) as unfinished:
    (unfinished / "part").write_text("half")
    print(unfinished, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with appearing(tmp_path / "other"), appearing(tmp_path / "out") as mine:
            assert (theirs / "part").is_file() and mine != theirs  # who is alive keeps his
        (tmp_path / "out").rmdir()
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    assert theirs.is_dir()
    with appearing(tmp_path / "another"):
        assert theirs.is_dir()  # of another target
    with appearing(tmp_path / "out"):
        assert not theirs.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other", "another"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 50}, r"lm_head.weight is \[61, 32\] in its files, and \[50, 32\] by its config"),
        ({"num_key_value_heads": 4}, r"k_proj.weight is \[16, 32\] in its files, and \[32, 32\] by its config"),
        ({"num_hidden_layers": 1}, r"has 1 layers by its config, but its files have model.layers.1.input_layernorm"),
        ({"num_hidden_layers": 0}, r"has 0 layers by its config, but its files have model.layers.0.input_layernorm"),
        ({"num_hidden_layers": 3}, r"incomplete: its files have no model.layers.2.input_layernorm"),
    ],
)
def test_a_config_of_another_model(changes: dict[str, int], message: str, models: Path) -> None:
    """Which would be filled with random numbers, or cut short."""
    rewrite_json(models / "base/config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_base(str(models / "base"))
    with pytest.raises(ValueError, match="base"):  # the record of the base model may notice first
        load(models / "adapter")
