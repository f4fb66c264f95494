"""Folders that are taken for a model's, and what they are instead."""

from __future__ import annotations

from pathlib import Path

from app.runs.checkpoints import MARKER, step_of
from longlora_ext.adapter._load import check_one_model


def is_adapter(path: str) -> bool:
    """Whether that is the folder of an adapter."""
    return (Path(path) / "adapter_config.json").is_file()


def check_run_folder(path: str) -> None:
    """Raise `ValueError` for the folder of a run, or a checkpoint, where what a run made is meant; and for a folder
    with a model and an adapter, of which one is meant."""
    check_one_model(path)
    if is_adapter(path) and (Path(path) / MARKER).is_file():
        raise ValueError(
            "this is a checkpoint, to go on from. The run's command makes an adapter of it with "
            f"--resume_from_checkpoint {path} --max_steps {step_of(Path(path))} --output_dir NEW_FOLDER"
        )
    made = [Path(path) / name for name in ("adapter", "model") if (Path(path) / name).is_dir()]
    if made and not is_adapter(path) and not (Path(path) / "config.json").is_file():
        raise ValueError(f"this is the folder of a run: use what it made, {made[0]}")


def check_model_folder(path: str) -> None:
    """Raise `ValueError` for what is no model but was made of one: a run's folder, an adapter."""
    check_run_folder(path)
    if is_adapter(path):
        raise ValueError(
            f"this is an adapter, not a model: merge it first, python examples/merge_adapter.py {path} MERGED_FOLDER"
        )
