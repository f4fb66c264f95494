"""QLoRA: frozen weights in 4 bits. The tests' requirements are without bitsandbytes, so it is installed beside them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_runs import ROOT, SCRIPT, environment, losses, make_model, make_text, small_run
from longlora_ext.adapter import load
from tiny_training import save_base

WORKER = Path(__file__).resolve().parents[1] / "helpers" / "qlora_worker.py"
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # on a CPU it wants multiples of 64
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def with_bitsandbytes() -> dict[str, str]:
    """The environment of a process that can import bitsandbytes."""
    folder = ROOT / "build" / "bitsandbytes"
    if not folder.is_dir():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*install, "bitsandbytes==0.50.2"], capture_output=True, text=True)
        if done.returncode and re.search(r"(?i)connection|resolve|timed out|retries", done.stderr):
            pytest.skip(f"NOT TESTED: the package registry cannot be reached: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr
    found = environment()
    paths = [str(folder), str(ROOT / "examples"), str(WORKER.parent), found["PYTHONPATH"]]
    return {**found, "PYTHONPATH": os.pathsep.join(paths)}


def test_an_adapter_of_a_4_bit_model_comes_back(with_bitsandbytes: dict[str, str], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", **WIDTHS)
    command = [sys.executable, str(WORKER), str(base), str(tmp_path / "adapter")]
    done = subprocess.run(command, env=with_bitsandbytes, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_trainer_takes_4_bits(with_bitsandbytes: dict[str, str], tmp_path: Path) -> None:
    model, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl")
    config = AutoConfig.from_pretrained(model)
    config.update(WIDTHS)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    command = [sys.executable, str(SCRIPT), *small_run(model, text, tmp_path / "out"), "--load_in_4bit"]
    done = subprocess.run(command, env=with_bitsandbytes, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(tmp_path / "out")
    assert found[6] < found[1] - 0.2
    load(tmp_path / "out" / "adapter")

    script = str(ROOT / "examples" / "evaluate.py")
    asked = ["perplexity", "--model", str(tmp_path / "out" / "adapter"), "--text", str(text), "--lengths", "64"]
    for option, dtype in (("", "float32"), ("--load_in_4bit", "float32, base model in 4 bits")):
        output = tmp_path / (option or "whole")
        command = [sys.executable, script, *asked, "--output", str(output), *filter(None, [option])]
        done = subprocess.run(command, env=with_bitsandbytes, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((output / "results.json").read_text())["settings"]["dtype"] == dtype
