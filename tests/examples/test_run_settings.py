"""Which arguments of examples/finetune_llama.py make a run another one, as resuming asks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from app.training import arguments
from app.training.recipe import CHECKPOINTING
from app.training.run_settings import settings


def settings_of(*words: str) -> dict:
    model, _, args = arguments.parse(["--output_dir", "out", *words])
    return json.loads(json.dumps(settings(model, args)))


@pytest.mark.parametrize(
    "option",
    [
        "--adam_beta2 0.9", "--adam_epsilon 1e-6", "--label_smoothing_factor 0.1", "--neftune_noise_alpha 5",
        "--dataloader_drop_last", "--optim adafactor", "--optim_args a=1", "--lora_alpha 8", "--seed 3", "--bf16",
        '--lr_scheduler_kwargs {"num_cycles":2}', "--per_device_train_batch_size 3", "--max_grad_norm 2",
    ],
)  # fmt: skip
def test_what_losses_depend_on_is_a_setting(option: str) -> None:
    plain = ("--bf16", "false") if option == "--bf16" else ()
    assert settings_of("--use_cpu", *option.split()) != settings_of("--use_cpu", *plain)


@pytest.mark.parametrize(
    "option",
    [
        "--max_steps 9", "--num_train_epochs 2", "--logging_steps 3", "--save_steps 7", "--save_total_limit 9",
        "--eval_tokens 5", "--eval_strategy epoch", "--dataloader_num_workers 2", "--report_to none", "--run_name me",
        f"--{CHECKPOINTING} true", "--resume_from_checkpoint latest", "--disable_tqdm true",
        "--per_device_eval_batch_size 2",
    ],
)  # fmt: skip
def test_what_no_loss_depends_on_is_none(option: str) -> None:
    assert settings_of(*option.split()) == settings_of()


def test_a_model_is_the_same_wherever_it_lies(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    first = settings_of("--model_name_or_path", str(inputs[0]))
    moved = shutil.copytree(inputs[0], tmp_path / "moved")
    assert settings_of("--model_name_or_path", str(moved)) == first
    with open(moved / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    assert settings_of("--model_name_or_path", str(moved))["model"] != first["model"]
    assert settings_of("--model_name_or_path", "some/model")["model"] == "some/model"


def test_other_gguf_files_in_a_folder_have_no_part_in_a_model(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Neither in one of the files nor in the model beside them."""
    folder = shutil.copytree(inputs[0], tmp_path / "model")

    def models() -> list[str]:
        given = (["--model_name_or_path", str(path)] for path in (folder, folder / "a.gguf"))
        return [settings_of(*words)["model"] for words in given]

    (folder / "a.gguf").write_bytes(b"GGUF a")
    first = models()
    (folder / "b.gguf").write_bytes(b"GGUF b")
    assert models() == first and first[0] != first[1]
    (folder / "a.gguf").write_bytes(b"GGUF c")
    again = models()
    assert again[0] == first[0] and again[1] != first[1]
