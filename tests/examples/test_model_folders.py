"""Folders given for a model's that are something else (examples/app/models/folders.py): told before a hub is asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import evaluate
import finetune_llama
import generate
import merge_adapter
import plan
from longlora_ext.adapter import load, load_base, lora_config, merge, prepare_model
from merged_models import save_random_adapter
from tiny_training import save_base


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What finetune_llama.py leaves, as far as its names go."""
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    return tmp_path / "run"


EVERYWHERE = pytest.mark.parametrize(
    "command",
    [
        lambda folder: evaluate.main(["passkey", "--model", folder]),
        lambda folder: generate.main(["--model", folder, "--file", __file__]),
        lambda folder: finetune_llama.main(["--model_name_or_path", folder]),
        lambda folder: plan.main(["--model", folder]),
        lambda folder: merge_adapter.main([folder, f"{folder}-merged"]),
    ],
)


@EVERYWHERE
def test_the_folder_of_a_run_is_told_from_what_it_made(command, run_folder: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(str(run_folder))
    assert f"this is the folder of a run: take what it made, {run_folder / 'adapter'}" in capsys.readouterr().err


@EVERYWHERE
def test_a_checkpoint_is_no_adapter(command, run_folder: Path, capsys) -> None:
    checkpoint = run_folder / "checkpoint-500"
    (run_folder / "adapter").rename(checkpoint)
    (checkpoint / "complete.json").write_text('{"step": 500}')
    with pytest.raises(SystemExit, match="2"):
        command(str(checkpoint))
    said = f"--resume_from_checkpoint {checkpoint} --max_steps 500 --output_dir NEW_FOLDER"
    assert said in capsys.readouterr().err


@EVERYWHERE
def test_a_folder_of_a_model_and_an_adapter_is_neither(command, run_folder: Path, capsys) -> None:
    """transformers would put the adapter on the model, PEFT take the model's own base."""
    both = run_folder / "adapter"
    (both / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit, match="2"):
        command(str(both))
    said = capsys.readouterr().err
    assert "holds a model (config.json) and an adapter (adapter_config.json)" in said and "folder of its own" in said


def test_nor_is_it_for_the_package(run_folder: Path, tmp_path: Path) -> None:
    both = run_folder / "adapter"
    (both / "config.json").write_text('{"model_type": "llama"}')
    for use in (load, lambda folder: load_base(str(folder)), lambda folder: merge(folder, tmp_path / "merged")):
        with pytest.raises(ValueError, match=r"adapter holds a model \(config.json\) and an adapter"):
            use(both)


def test_an_adapter_that_transformers_has_put_on_a_model_is_no_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "both")
    for path in adapter.iterdir():
        shutil.copy(path, tmp_path / "both")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="the model has an adapter already: pass the base model"):
        prepare_model(model, lora_config(model, modules_to_save=None))
    with pytest.raises(ValueError, match="both holds a model"):
        load(adapter, base_model=str(tmp_path / "both"))
    with pytest.raises(ValueError, match="both holds a model"):
        merge(adapter, tmp_path / "merged", base_model=str(tmp_path / "both"))


@pytest.mark.parametrize(
    "command",
    [
        lambda folder: finetune_llama.main(["--model_name_or_path", folder]),
        lambda folder: plan.main(["--model", folder]),
    ],
)
def test_an_adapter_is_no_model(command, run_folder: Path, capsys) -> None:
    adapter = str(run_folder / "adapter")
    with pytest.raises(SystemExit, match="2"):
        command(adapter)
    assert f"merge it first, python examples/merge_adapter.py {adapter}" in capsys.readouterr().err
