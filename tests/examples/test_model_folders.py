"""Folders given for a model's that are something else (examples/app/models/folders.py): told before a hub is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

import evaluate
import finetune_llama
import generate
import merge_adapter
import plan


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
